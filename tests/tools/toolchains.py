"""Scripts that answer as compilers do, for the tests of the build."""


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def toolkit(folder, release="12.8", archs=(75, 80, 90, 100, 120), lib="lib64", dry_run=""):
    listed = "; ".join(f"echo compute_{arch}" for arch in archs)
    nvcc = script(
        folder / "bin/nvcc",
        f'case "$1" in --version) echo "Cuda compilation tools, release {release}, V{release}.1";;\n'
        f"--list-gpu-arch) {listed};;\n--dryrun) {dry_run or 'true'};; esac",
    )
    for file in ("include/cuda_runtime.h", f"{lib}/libcudart_static.a"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return nvcc

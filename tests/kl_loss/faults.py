"""Every fault that a test plants in kl_loss's kernels, by the check that must see it."""

from tools.faults import Fault

UNIT = "kl_loss/cuda/rows.cu"
ROW_KERNELS, DIVERGENCE = "kl_loss/cuda/row_kernels.cuh", "kl_loss/cuda/divergence.cuh"
REDUCE, VEC = "common/cuda/reduce.cuh", "common/cuda/vec.cuh"
STATE, TILES = "kl_loss/cuda/row_state.cuh", "kl_loss/cuda/tile_kernels.cuh"
PAIRS, MIXTURE = "kl_loss/cuda/row_pairs.cuh", "kl_loss/cuda/tile_mixture.cuh"
TRITON_ROWS, TRITON_MATH, TRITON_LINEAR, TRITON_SCALE, TRITON_METRICS = (
    f"kl_loss/kernel_triton/{name}.py" for name in ("rows", "divergence", "linear", "scale", "metrics")
)
TRITON_ARGUMENTS, TRITON_LAUNCH_LINEAR, TRITON_STUDENT = (
    f"kl_loss/kernel_triton/{name}.py" for name in ("arguments", "launch_linear", "student")
)
CLUSTERS = "kl_loss/cuda/cluster_kernels.cuh"
ALIGNED_LOAD = "    if (aligned) {\n#pragma unroll\n      for (int i = 0; i < kAccesses; ++i) {\n"
CUDA_ARTIFACTS = {  # name: faults in the source, compiler flags, what the gate says
    "local memory": (  # indexed by what the compiler cannot know
        (
            Fault(
                ROW_KERNELS,
                "  float value = state.loss();",
                "  float table[64] = {};\n#pragma unroll 1\n  for (int i = 0; i < 64; ++i)\n"
                "    table[options.vocab_size * i % 64] += float(i);\n"
                "  float value = state.loss() + table[blockDim.x % 64];",
            ),
        ),
        (),
        "spills",
    ),
    "scalar loads": (
        (Fault(VEC, ALIGNED_LOAD, ALIGNED_LOAD.replace("(aligned)", "(false)")),),
        (),
        r" 0 128-bit loads",
    ),
    "loads one by one": (  # what is read depends on what was read before
        (
            Fault(
                PAIRS,
                "load<kLast>(student.logits + turn.column[i], true);",
                "load<kLast>(student.logits + turn.column[i]\n"
                "          + 4 * (i > 0 && turn.student[i > 0 ? i - 1 : 0].words[0].x == 77u), true);",
            ),
            Fault(
                PAIRS,
                "load<kLast>(teacher.logits + turn.column[i], true);",
                "load<kLast>(teacher.logits + turn.column[i]\n"
                "          + 4 * (i > 0 && turn.teacher[i > 0 ? i - 1 : 0].words[0].x == 77u), true);",
            ),
        ),
        (),
        r"kl_forward_kernel.*loads together",
    ),
    "spills": (  # twice as many logits as the registers hold
        (Fault(ROW_KERNELS, "kPairsAtOnce = 16;", "kPairsAtOnce = 32;"),),
        (),
        r"kl_forward_kernel.*spills",
    ),
    "more shared memory": (
        (Fault(REDUCE, "kMaxWarps = 32;", "kMaxWarps = 64;"),),
        (),
        "bytes of shared memory",
    ),
    "too many registers": (
        (Fault(ROW_KERNELS, "kGradBlocksPerSM = 2;", "kGradBlocksPerSM = 1;"),),
        ("-Xptxas=-O0",),
        "registers, at most",
    ),
}

BLOCK_BARRIER = "  __syncthreads();\n  const int warps"
PASS_ONE = "  RowStats stat = state.stats();\n"
ANOTHER_PASS = "  stat.kl = row_state(pairs, state, partial_states, of_metrics.tau()...).loss();\n"
ZERO_PADDING = "columns - options.vocab_size, begin, step);"
# test_cuda.py::test_planted_fault_is_found plants them: name: (check, fault, what the failure says)
CUDA_ROWS = {
    "no rescale": (
        "rising",
        Fault(DIVERGENCE, "return {top, mass(top) + other.mass(top)};", "return {top, sum + other.sum};"),
        "Not equal to tolerance",
    ),
    "no barrier": (
        "orders",
        Fault(REDUCE, BLOCK_BARRIER, BLOCK_BARRIER.replace("  __syncthreads();\n", "")),
        "Not equal to tolerance",
    ),
    "divergent barrier": (
        "orders",
        Fault(REDUCE, BLOCK_BARRIER, BLOCK_BARRIER.replace("  __", "  if (warp != 1 || lane < 16) __")),
        "deadlock in block",
    ),
    "out of bounds": (
        "bounds",
        Fault(VEC, "rest = n - runs * kRun;", "rest = n - runs * kRun + 1;"),
        "load outside of the allowed regions",
    ),
    "misaligned": (
        "alignment",
        Fault(VEC, "if (head > n) head = n;", "head = 0;"),
        "misaligned 16-byte access",
    ),
    "another pass": (
        "traffic",
        Fault(ROW_KERNELS, PASS_ONE, PASS_ONE + ANOTHER_PASS),
        r"assert \(?98304 == ",
    ),
    "scalar loads": (
        "traffic",
        Fault(VEC, ALIGNED_LOAD, ALIGNED_LOAD.replace("aligned", "false")),
        "narrow",
    ),
    "padding not zeroed": ("padding", Fault(ROW_KERNELS, ZERO_PADDING, f"-1 + {ZERO_PADDING}"), "never"),
}

DIFFERS = "Not equal to tolerance"
BEGUN, BEGUN_SUMS = ") {\n    begun = state_of(load", ") begun = load_fields<MixtureSums>"
EACH_TWICE = "  if (row_of<Row>(row_state(pairs, begun, partial, of_metrics.tau()...)).kl < 0.0f) return;\n"
MERGED = "  const State merged = row_state(pairs, begun, partial, of_metrics.tau()...);\n"
# test_tiles_cuda.py::test_planted_fault_is_found plants them: name: (check, fault, what the failure says)
CUDA_LINEAR = {
    "digits of 1e4": (
        "edges",
        Fault(DIVERGENCE, "fabsf(max_s - max_t) > kApart", "max_s - max_t > 1e30f"),
        "expected",
    ),
    "a part without mass and of infinite KL": (
        "edges",
        Fault(STATE, "(p == 0.0f ? 0.0f : p * part.kl)", "p * part.kl"),
        "expected",
    ),
    "last row of a finishing grid": (
        "finish",
        Fault(
            "kl_loss/cuda/linear_torch.cuh",
            "(rows + kFinishThreads - 1) / kFinishThreads",
            "(rows + kFinishThreads - 2) / kFinishThreads",
        ),
        "assert",
    ),
    "masses of the parts left out": (
        "tiles",
        Fault(STATE, "return kl_term(p, q, log_ratio) + (p ==", "return (p =="),
        DIFFERS,
    ),
    "a state that nobody wrote": ("tiles", Fault(TILES, "&& !first" + BEGUN, BEGUN), DIFFERS),
    "earlier tiles counted by every thread": (
        "tiles",
        Fault(TILES, "threadIdx.x == 0 && !first" + BEGUN, "!first" + BEGUN),
        DIFFERS,
    ),
    "JSD forgets earlier tiles": (
        "tiles by JSD",
        Fault(MIXTURE, "&& !first" + BEGUN_SUMS, "&& !first && row < 0" + BEGUN_SUMS),
        DIFFERS,
    ),
    "no bias": ("tiles", Fault(PAIRS, "x[i] += b[i];", "x[i] += 0.0f * b[i];"), DIFFERS),
    "no barrier": (
        "orders",
        Fault(REDUCE, BLOCK_BARRIER, BLOCK_BARRIER.replace("  __syncthreads();\n", "")),
        DIFFERS,
    ),
    "a row that does not count": (
        "bounds",
        Fault(PAIRS, "return mask == nullptr || load_scalar", "return mask != nullptr || load_scalar"),
        "load outside of the allowed regions",
    ),
    "a run too many": (
        "bounds",
        Fault(PAIRS, "first + i * step : split.runs - 1;", "first + i * step : split.runs;"),
        "load outside of the allowed regions",
    ),
    "each logit twice": (
        "traffic",
        Fault(TILES, MERGED, MERGED + EACH_TWICE),
        r"163840, 0",
    ),
    "scalar stores": (
        "traffic",
        Fault(
            VEC,
            "v.x = pack_word(in + i, p);",
            "v.x = 0; store_scalar(p + i, from_float<T>(in[i]));",
        ),
        "assert",
    ),
}

SCALE = "kl_loss/cuda/scale_grad.cuh"
# test_scaling.py::test_planted_fault_is_found plants them: name: (check, fault, what the failure says)
CUDA_SCALE = {
    "a factor of one": ("traffic", Fault(SCALE, "if (factor == 1.0f) return;", ""), "bytes of grad"),
    "a factor near one": (
        "values",
        Fault(SCALE, "factor == 1.0f", "fabsf(factor - 1.0f) < 1e-6f"),
        "became|rounds to",
    ),
    "no first elements": (
        "values",
        Fault(SCALE, "threadIdx.x < rest", "threadIdx.x + head < rest"),
        "became",
    ),
    "at any address": (
        "bounds",
        Fault(SCALE, "past == 0 ? 0 : (16 - past)", "past == 0 ? 0 : 0 * (16 - past)"),
        "misaligned 16-byte access",
    ),
    "a turn beyond the end": (
        "bounds",
        Fault(SCALE, "if (turn + kTurn <= vectors) {", "if (turn <= vectors) {"),
        "load outside of the allowed regions",
    ),
    "one turn a block": (
        "many turns",
        Fault(SCALE, "turn += gridDim.x * kTurn", "turn += gridDim.x * kTurn + vectors"),
        "became",
    ),
    "one by one": (
        "traffic",
        Fault(SCALE, "vectors = (n - head) / kVec, rest", "vectors = (n - head) / kVec - 1, rest"),
        "narrow",
    ),
}

LAST_BARRIER = "  cluster_sync();  // a block that exits"
CLUSTER_BARRIER = "  cluster_sync();\n  if (warp == 0) {\n"
# test_clusters_cuda.py::test_planted_fault_is_found plants them: name: (check, fault, what the failure says)
CUDA_CLUSTERS = {
    "no barrier before the others are read": (
        "values",
        Fault(REDUCE, CLUSTER_BARRIER, CLUSTER_BARRIER.replace("cluster_sync", "__syncthreads")),
        DIFFERS,
    ),
    "no barrier before exit": (
        "orders",
        Fault(CLUSTERS, LAST_BARRIER, LAST_BARRIER.replace("cluster_sync()", "")),
        "has exited, is read",
    ),
    "a barrier that one block leaves out": (
        "values",
        Fault(CLUSTERS, LAST_BARRIER, LAST_BARRIER.replace("cluster", "if (cluster_rank() > 0) cluster")),
        "deadlock in the cluster|rank 0, which has exited, is read",  # whichever comes first
    ),
    "no barrier after the cluster's result": (
        "values",
        Fault(REDUCE, "  __syncthreads();\n  return shared->cluster;", "  return shared->cluster;"),
        DIFFERS,
    ),
    "always the first block's": (
        "values",
        Fault(REDUCE, "load_of_rank(&shared->block, lane)", "load_of_rank(&shared->block, 0)"),
        DIFFERS,
    ),
    "a rank of another cluster": (
        "values",
        Fault(REDUCE, "load_of_rank(&shared->block, lane)", "load_of_rank(&shared->block, lane + 1)"),
        "rank 8 is not in the cluster",
    ),
    "the last run counted several times": (
        "values",
        Fault(PAIRS, "turn.within(i) ? run_s[j] : -INFINITY", "run_s[j]"),
        f"{DIFFERS}|error",
    ),
    "the last run written several times": (
        "values",
        Fault(PAIRS, "if (!turn.within(i)) continue;", ""),
        "twice|assert",
    ),
    "backwards from beyond the end": (
        "values",
        Fault(PAIRS, "? split.runs - 1 - run", "? split.runs - run"),
        "load outside of the allowed regions",
    ),
    "a kl that the gradient does not know": (
        "values by JSD",
        Fault(CLUSTERS, "    stat.kl = mixture.student;\n", ""),
        "error",
    ),
    "padding not zeroed": ("values", Fault(CLUSTERS, ZERO_PADDING, f"-1 + {ZERO_PADDING}"), "assert"),
}

METRICS = "kl_loss/cuda/metrics.cuh"
WRONG = "^$|assert|error|expected|not equal"  # "": asserts of cases
# test_metrics_cuda.py::test_planted_fault_is_found plants them: name: (check, fault, what the failure says)
CUDA_METRICS = {
    "dot of another maximum": ("rows", Fault(METRICS, "dot + y * sum)", "dot)"), WRONG),
    "sum of another maximum": ("rows", Fault(METRICS, "return {sum * mass, ", "return {sum, "), WRONG),
    "no temperature": ("rows", Fault(METRICS, "y = (s[i] - zero) * tau;", "y = s[i] - zero;"), WRONG),
    "no temperature in the probabilities": (
        "rows",
        Fault(METRICS, "exp_approx((s - max_s) * tau)", "exp_approx(s - max_s)"),
        WRONG,
    ),
    "the factor of another temperature": (
        "rows",
        Fault(METRICS, "weight * options.tau,", "weight,"),
        WRONG,
    ),
    "a total of what is no token": (
        "rows",
        Fault(METRICS, "is_token(i) ? s[i] : 0.0f", "s[i]"),
        WRONG,
    ),
    "nothing for what is smoothed": (
        "rows",
        Fault(METRICS, "target = column == label ? hit : spread", "target = column == label ? hit : 0.0f"),
        WRONG,
    ),
    "a label of another tile": ("tiles", Fault(METRICS, " - first_token;", ";"), WRONG),
    "a label forgotten": (
        "tiles",
        Fault(METRICS, "begun = first ? -INFINITY :", "begun = first || true ? -INFINITY :"),
        WRONG,
    ),
    "a state forgotten": (
        "tiles",
        Fault(TILES, "of_metrics.load(row)...", "(of_metrics.load(row), MetricSums::empty())..."),
        WRONG,
    ),
    "rows that do not count, of tiles": (
        "tiles",
        Fault(METRICS, "if (!valid) return out.store_zero(row);", ""),
        WRONG,
    ),
    "rows that do not count": (
        "whole rows",
        Fault(ROW_KERNELS, "(of_metrics.store_zero(row), ...);", ""),
        WRONG,
    ),
    "nothing times infinity": (
        "masked out",
        Fault(METRICS, "mass == 0.0f ? 0.0f : mass * y", "mass * y"),
        f"{WRONG}|{DIFFERS}",
    ),
    "an infinite divergence without weight": (
        "unknown",
        Fault(METRICS, "kl_weight == 0.0f ? 0.0f : kl_weight * grad", "kl_weight * grad"),
        WRONG,
    ),
    "the sum of the loss's temperature": (
        "clusters",
        Fault(CLUSTERS, "1.0f / state.sum_y(metrics.tau())", "1.0f / state.row.student.sum"),
        WRONG,
    ),
    "a label by each thread": (
        "traffic",
        Fault(ROW_KERNELS, "if (threadIdx.x == 0) (of_metrics.store", "(of_metrics.store"),
        WRONG,
    ),
}

STUDENT = "kl_loss/cuda/student_kernels.cuh"
# test_student_cuda.py::test_planted_fault_is_found plants them: name: (check, fault, what the failure says)
CUDA_STUDENT = {
    "a total of what was taken out": (
        "stats",
        Fault(STUDENT, "return !masked_out(s[i]);", "return s[i] == s[i];"),
        f"{DIFFERS}|{WRONG}",
    ),
    "a state forgotten": ("stats", Fault(STUDENT, "threadIdx.x == 0 && !first", "false"), DIFFERS),
    "the last run counted several times": (
        "stats",
        Fault(STUDENT, "first + i * step < split.runs ? run[j] : -INFINITY", "run[j]"),
        DIFFERS,
    ),
    "of no token": (
        "nothing",
        Fault(STUDENT, "row_lse == -INFINITY ? INFINITY : row_lse", "row_lse"),
        WRONG,
    ),
    "the sum of the loss's temperature": (
        "grad",
        Fault(STUDENT, "lse * inv_tau, 1.0f, weight", "lse, 1.0f, weight"),
        WRONG,
    ),
    "padding not zeroed": ("grad", Fault(STUDENT, ZERO_PADDING, f"-1 + {ZERO_PADDING}"), WRONG),
    "runs one by one": (
        "traffic",
        Fault(STUDENT, "split(student.logits, options.vocab_size)", "split(student.logits, 0)"),
        "assert",
    ),
}

TRITON_ARTIFACTS = {  # name: launches, faults, what the gate says
    "spills": (
        "linear forward bf16",
        (Fault(TRITON_LINEAR, "KEEP_EXP=False", "KEEP_EXP=True"),),
        "spilled registers",
    ),
    "no tensor cores": (
        "linear forward bf16",
        (
            Fault(
                TRITON_LINEAR,
                "tl.dot(x, tl.trans(w), z)",
                'tl.dot(x.to(tl.float32), tl.trans(w).to(tl.float32), z, input_precision="ieee")',
            ),
            Fault(
                TRITON_LAUNCH_LINEAR,
                "return LinearBlocks(128, 128) if generation in (9, 10)",
                "return LinearBlocks(32, 32) if generation in (9, 10)",
            ),
        ),
        "no HGMMA",
    ),
    "spills of metrics": (
        "linear smoothed with metrics",
        (Fault(TRITON_LAUNCH_LINEAR, " and not crowded", ""),),
        "spilled registers",
    ),
    "scalar accesses": (
        "grad forward bf16",
        (Fault(TRITON_ROWS, '["stride_mn", "stride_wn", ', '["stride_mn", "stride_sn", '),),
        "wide_loads 2, at least",
    ),
    "few loads together": (  # four times the threads, so that each has a quarter of the loads
        "tile_stats forward",
        (Fault(TRITON_ARGUMENTS, "block // 512", "block // 128"),),
        "loads_together 2, at least 8",
    ),
    "registers": (
        "rows forward bf16",
        (Fault(TRITON_ARGUMENTS, "block // 512", "block // 2048"),),
        "registers",
    ),
}

TRITON_RECOMPILES = [  # fault, the kernels that are then compiled anew
    (
        Fault(TRITON_ROWS, '["stride_mn", "stride_state", ', '["stride_mn", '),
        {"tile_stats_kernel"},
    ),
    (Fault(TRITON_ROWS, '"stride_ln", "stride_metric", ', '"stride_ln", '), {"tile_stats_kernel"}),
    (
        Fault(TRITON_ROWS, 'PER_ROW = (\n    "mask_ptr", ', "PER_ROW = (\n    "),
        {"forward_kernel", "grad_kernel"},
    ),
]

# test_triton.py::test_planted_fault_is_found plants them: name: (cases by -k, fault, what the output says)
TRITON_VALUES = {
    "the last group of blocks taken for a full one": (
        "test_linear_fused_statistics and 0.0",
        Fault(TRITON_LINEAR, "tl.minimum(tl.cdiv(N, BLOCK_N) - group * GROUP, GROUP)", "GROUP"),
        "Not equal to tolerance",
    ),
    "no rescale between blocks": (
        "rows_rising and 0.0",
        Fault(
            TRITON_MATH,
            "a_mass_s, b_mass_s = a_sum_s * tl.exp(a_max_s - base_s)",
            "a_mass_s, b_mass_s = a_sum_s",
        ),
        "Not equal to tolerance",
    ),
    "a load without its mask": (
        "test_rows and dtype0-0.0",
        Fault(TRITON_ROWS, "tl.load(ptr + columns, mask=inside, other=-INF)", "tl.load(ptr + columns)"),
        r"KernelFault.*reads \d+ element",
    ),
    "a store without its mask": (
        "test_rows and dtype0-0.0",
        Fault(TRITON_ROWS, ", mask=offs_v < columns)", ")"),
        r"KernelFault.*writes \d+ element",
    ),
    "programs that write one address": (
        "test_rows and dtype0-0.0",
        Fault(TRITON_ROWS, "tl.store(loss_ptr + rows,", "tl.store(loss_ptr + rows * 0,"),
        "KernelFault.*race|KernelFault.*program",
    ),
    "a state that nobody wrote": (
        "test_linear and dtype0 and 0.0 and recompute",
        Fault(TRITON_ROWS, "    if not FIRST:\n        max_s", "    if FIRST or not FIRST:\n        max_s"),
        "Not equal to tolerance",
    ),
    "digits of 1e4": (
        "rows_at_edges and 0.0-1.0",
        Fault(TRITON_MATH, "tl.abs(max_s - max_t) > APART", "tl.abs(max_s - max_t) > 1e30"),
        "expected",
    ),
    "elements beyond the last block": (
        "test_scale_grad",
        Fault(TRITON_SCALE, "rest = lanes < n - whole * BLOCK", "rest = lanes < n - whole * BLOCK - 1"),
        "became|rounds to",
    ),
    "a factor that is rounded": (
        "test_scale_grad",
        Fault(
            TRITON_SCALE,
            "factor = tl.load(factor_ptr)",
            "factor = tl.load(factor_ptr).to(grad_ptr.dtype.element_ty).to(tl.float32)",
        ),
        "became|rounds to",
    ),
    "splits that overlap": (
        "fused_statistics and 0.0",
        Fault(
            TRITON_LINEAR, "tl.minimum(first + tiles_per_split,", "tl.minimum(first + tiles_per_split + 1,"
        ),
        "Not equal to tolerance",
    ),
}

LABEL_OF_FIRST = "load_label(labels_ptr, row, stride_ln, 0, V)"
SPLITS_AT_ONE = "                b_max_s, a_max_s, sum_y, dot_y, b_max_s, b_sum_y"
TRITON_VALUES |= {  # of metrics and cross-entropy
    "a lower maximum's terms taken for the higher one's": (
        "metrics_of_rows and plain and 0.0",
        Fault(TRITON_METRICS, "share * (dot_y + sum_y * fall)", "share * dot_y"),
        "AssertionError",
    ),
    "the entropy of a masked-out token": (
        "metrics_of_masked_out_tokens and plain",
        Fault(TRITON_METRICS, "tl.maximum(below, LOWEST)", "below"),
        "Not equal to tolerance",
    ),
    "no temperature": (
        "metrics_of_masked_out_tokens and warm",
        Fault(TRITON_METRICS, "        below *= tau\n", ""),
        "Not equal to tolerance",
    ),
    "padding among the tokens that smoothing spreads over": (
        "metrics_of_rows and smooth",
        Fault(TRITON_METRICS, "tl.where(in_vocab, at_temperature_one(s, tau, TEMPERED), 0.0)", "s"),
        "AssertionError",
    ),
    "metrics of a row that does not count": (
        "metrics_of_rows_that_do_not_count",
        Fault(TRITON_METRICS, "tl.where(counts, ce, 0.0)", "ce"),
        "AssertionError",
    ),
    "a label that is no token": (
        "metrics_of_unknown_labels",
        Fault(TRITON_ROWS, "(label >= 0) & (label < end)", "label >= 0"),
        r"KernelFault.*reads \d+ element|AssertionError",
    ),
    "a divergence of weight 0": (
        "metrics_of_unknown_labels",
        Fault(TRITON_ROWS, "tl.where(weight == 0.0, 0.0, grad * weight)", "grad * weight"),
        "AssertionError",
    ),
    "the label of an earlier tile": (
        "metrics_of_tiles and 0.0",
        Fault(TRITON_ROWS, "label_y = tl.maximum(label_y, of_tile)", "label_y = of_tile"),
        "AssertionError",
    ),
    "every tile taken for the first": (
        "metrics_of_tiles and 0.0",
        Fault(TRITON_ROWS, "load_label(labels_ptr, row, stride_ln, first_token, V)", LABEL_OF_FIRST),
        "AssertionError",
    ),
    "a state of metrics that nobody wrote": (
        "metrics_of_tiles and 0.0",
        Fault(
            TRITON_ROWS,
            "        if not FIRST:\n            sum_y",
            "        if FIRST or not FIRST:\n            sum_y",
        ),
        "AssertionError",
    ),
    "the cross-entropy's gradient at the wrong temperature": (
        "metrics_of_masked_out_tokens and warm",
        Fault(
            TRITON_ROWS,
            "at_temperature_one(tl.load(ce_weight_ptr + row * stride_cn), tau, TEMPERED)",
            "tl.load(ce_weight_ptr + row * stride_cn)",
        ),
        "AssertionError",
    ),
    "a label counted from where the split begins": (
        "metrics_of_fused_statistics and plain",
        Fault(
            TRITON_LINEAR,
            "is_label = offs_v[None, :] == label[:, None]",
            "is_label = offs_v[None, :] - first * BLOCK_V == label[:, None]",
        ),
        "Not equal to tolerance",
    ),
    "splits whose metrics are added without their maxima": (
        "metrics_of_fused_statistics and warm",
        Fault(TRITON_LINEAR, "                max_s, a_max_s, sum_y, dot_y, b_max_s, b_sum_y", SPLITS_AT_ONE),
        "Not equal to tolerance",
    ),
}

TRITON_VALUES |= {  # of the student alone
    "a state of the student that nobody wrote": (
        "student_stats and smooth",
        Fault(
            TRITON_STUDENT,
            "    if not FIRST:\n        max_s",
            "    if FIRST or not FIRST:\n        max_s",
        ),
        f"AssertionError|{DIFFERS}",
    ),
    "no rescale between the student's blocks": (
        "student_stats and plain",
        Fault(TRITON_STUDENT, "a_sum * tl.exp(a_max - base)", "a_sum"),
        DIFFERS,
    ),
    "tokens taken out among those that smoothing spreads over": (
        "student_stats and smooth",
        Fault(TRITON_STUDENT, "b_max_s, b_sum_s, s != -INF, tau", "b_max_s, b_sum_s, s == s, tau"),
        f"AssertionError|{DIFFERS}",
    ),
    "log-sum-exp of no tokens": (
        "student_of_no_weight",
        Fault(TRITON_STUDENT, "tl.where(lse == -INF, 0.0, grad)", "grad"),
        "AssertionError",
    ),
    "the student's padding not zeroed": (
        "student_grad and plain",
        Fault(TRITON_STUDENT, "mask=offs_v < columns", "mask=(offs_v < columns) & (offs_v < V)"),
        "AssertionError",
    ),
    "one log-sum-exp for both": (
        "student_grad and plain",
        Fault(TRITON_STUDENT, "at_temperature_one(s, tau, TEMPERED) - lse_y)", "s - lse)"),
        "AssertionError",
    ),
}

# test_triton.py::test_planted_extra_pass_is_found plants them
TRITON_STUDENT_TRAFFIC = Fault(
    TRITON_STUDENT,
    "        b_max_s, e_s, b_sum_s = block_mass(s)\n",
    "        s += 0.0 * tl.load(student_ptr + offs_v, mask=offs_v < end, other=0.0).to(tl.float32)\n"
    "        b_max_s, e_s, b_sum_s = block_mass(s)\n",
)
TRITON_METRICS_TRAFFIC = Fault(
    TRITON_ROWS,
    "        if METRICS:\n            b_sum_y",
    "        if METRICS:\n"
    "            s = load_logits(student_ptr, student_bias_ptr, offs_v, offs_v < end, s_factor, s_over_cap,\n"
    "                            s_cap, CAP_S)\n"
    "            b_sum_y",
)
TRITON_SCALE_TRAFFIC = Fault(TRITON_SCALE, "if factor != 1.0:", "if factor == factor:")
TRITON_TRAFFIC = Fault(
    TRITON_ROWS,
    "    rows = row + tl.arange(0, 1)\n",
    "    kl += 0.0 * tl.sum(tl.load(student_ptr + tl.arange(0, BLOCK_V)).to(tl.float32), 0)\n"
    "    rows = row + tl.arange(0, 1)\n",
)

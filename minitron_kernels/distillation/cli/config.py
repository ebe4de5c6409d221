"""The configuration of a command: defaults, a TOML file over them, flags over both; and its TOML.

    [train]
    student = "Minitron-8B"
    seq_len = 8192

A file may have tables for several commands. A key that is not known is refused.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_kernels.distillation.cli.tables import REQUIRED, TABLES, options_of

_INSTEAD = (("steps", "tokens", "epochs"), ("teacher", "cache"))


def load(command: str, file: Path | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The effective configuration: {option: value}, None where an option is not set.

    Raises:
        ValueError, OSError: the file cannot be read, or has a key or a value that is wrong.
    """
    config = {name: option.default for name, option in options_of(command).items()}
    config |= {} if file is None else read_toml(command, file)
    for names in _INSTEAD:  # a flag is instead of what the file says by another name
        if any(name in flags for name in names):
            config |= {name: None for name in names if name in config}
    return config | dict(flags)


def parse_toml(file: Path) -> dict[str, Any]:
    """What a TOML file says.

    Raises:
        ValueError, OSError: it is not TOML in UTF-8; it cannot be read.
    """
    try:
        return toml_of(file.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: must be TOML in UTF-8, but byte {error.start} is not") from None
    except ValueError as error:
        raise ValueError(f"{file}: is not TOML: {error}") from None


def toml_of(text: str) -> dict[str, Any]:
    """What TOML says.

    Raises:
        ValueError: it is not TOML.
    """
    try:
        import tomllib  # type: ignore[import-not-found,unused-ignore]
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib  # type: ignore[import-not-found,no-redef,unused-ignore]
        except ImportError:
            raise ImportError(
                "a TOML file needs Python 3.11, or the package tomli: pip install tomli"
            ) from None
    found: dict[str, Any] = tomllib.loads(text)
    return found


def read_toml(command: str, file: Path) -> dict[str, Any]:
    """The options that the command's table of a TOML file gives."""
    tables = parse_toml(file)
    for name, table in tables.items():
        if name not in TABLES:
            owners = [known for known in TABLES if name.replace("-", "_") in options_of(known)]
            advice = f"; it goes below [{owners[0]}]" if owners else near(name, TABLES)
            raise ValueError(f"{file}: has no table for {name!r}: tables are [train] and [cache]{advice}")
        if not isinstance(table, dict):
            raise ValueError(f"{file}: {name} must be a table, [{name}], got {table!r}")
    if command not in tables:
        raise ValueError(f"{file}: has no table [{command}]")
    return _read_table(command, tables[command], f"{file}: [{command}]")


def _read_table(command: str, table: Mapping[str, Any], where: str) -> dict[str, Any]:
    options, found = options_of(command), {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in options:
            raise ValueError(f"{where} has an unknown key {key}{near(name, options)}")
        if name in found:
            raise ValueError(f"{where} has {name} twice, with - and with _")
        found[name] = options[name].read(value, f"{where} {key}")
    return found


def near(name: str, names: Any) -> str:
    """ "; did you mean ...?", or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def check_required(command: str, config: Mapping[str, Any]) -> None:
    """Raises ValueError for options that are needed and given nowhere."""
    options = options_of(command)
    if lacking := [options[name].flag for name in REQUIRED[command] if not config[name]]:
        raise ValueError(f"{command} needs {', '.join(lacking)} (on the command line or in --config)")


def to_toml(command: str, config: Mapping[str, Any], *, about: str = "") -> str:
    """The configuration as TOML, that reads back as the same; options that are not set are comments."""
    lines = [f"# {about}"] if about else []
    lines.append(f"[{command}]")
    for group, _, options in TABLES[command]:
        lines += ["", f"# {group}"]
        for option in options:
            value = config[option.name]
            lines.append(f"# {option.name} =" if value is None else f"{option.name} = {_value(value)}")
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, str):
        # a JSON string is one of TOML too, but for this character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)


def differences(command: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The flags of options that differ and must not, where a run is resumed."""
    options = options_of(command)
    return [
        option.flag
        for name, option in options.items()
        if not option.may_change and name != "out" and before.get(name, option.default) != now[name]
    ]

"""reference/tolerances.toml: measured noise floors and what is allowed above; `python -m reference.noise` writes it.

A tolerance is its section's multiple of the floor beside it. Lines only tighten: `loosened` finds those that grew
without a new measurement.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it on Python 3.10

from qwen_mlx.errors import QwenMLXError

from .comparison import Tolerance
from .taps import TAPS

FILE = Path(__file__).with_name("tolerances.toml")
FIELDS = ("l2_floor", "l2", "row_floor", "row")
# Allowed distance above the floor, as (l2, row). float32: against the reference's float32, so both sides' noise adds
# up. Others: against the reference's float32, where its own error in that dtype is the yardstick. An extreme of few
# roundings, the worst row or a call of one token on a small model, varies more than an error over many.
MULTIPLES = {
    "small": {"float32": (4.0, 4.0), "bfloat16": (1.5, 1.5), "float16": (1.5, 1.5)},
    "real": {"float32": (4.0, 4.0), "bfloat16": (1.1, 1.2), "float16": (1.1, 1.2)},
    # Any model and prompt, whose floors are measured once (--noise). In calls of one token chance says more: the real
    # file's logits are up to 1.7 times as far off as Hugging Face's in the same call, though 0.87 times on average.
    "own": {"float32": (4.0, 4.0), "bfloat16": (2.0, 2.0), "float16": (2.0, 2.0)},
}
DTYPES = tuple(MULTIPLES["real"])


def read(text: str | None = None) -> dict[str, Any]:
    """The parsed file (or `text`): {model: {dtype: {"multiples", "measured", tap: {...}}}}."""
    try:
        return tomllib.loads(FILE.read_text(encoding="utf-8") if text is None else text)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise QwenMLXError(f"{FILE}: cannot be read ({error}); write it with python -m reference.noise.") from None


def tolerances(model: str, dtype: str) -> dict[str, Tolerance]:
    """Tolerances by tap of a section, "small" or "real"."""
    return {
        tap: Tolerance(line["l2"], line["row"], line["l2_floor"], line["row_floor"])
        for tap, line in lines(_section(model, dtype))
    }


def measured(model: str, dtype: str) -> str:
    """Says what a section's floors were measured on, when and by which versions."""
    return _section(model, dtype)["measured"]


def _section(model: str, dtype: str) -> dict[str, Any]:
    section = read().get(model, {}).get(dtype)
    if section is None:
        raise QwenMLXError(f"{FILE}: has no section [{model}.{dtype}]; write it with python -m reference.noise.")
    return section


def lines(section: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    return [(tap, line) for tap, line in section.items() if isinstance(line, dict)]


def from_floors(floors: dict[str, tuple[float, float]], dtype: str, model: str = "own") -> dict[str, Tolerance]:
    """Tolerances from measured (l2, row) floors."""
    whole, single = MULTIPLES[model][dtype]
    return {key: Tolerance(whole * l2, single * row, l2, row) for key, (l2, row) in floors.items()}


def section_text(model: str, dtype: str, floors: dict[str, tuple[float, float]], measured: str) -> str:
    """A section as it stands in the file; floors rounded up to two digits."""
    whole, single = MULTIPLES[model][dtype]
    rows = [f"[{model}.{dtype}]", f"multiples = [{whole}, {single}]", f'measured = "{measured}"']
    for tap in TAPS:
        l2, row = (_rounded_up(floor) for floor in floors[tap])
        values = dict(zip(FIELDS, (l2, _product(whole, l2), row, _product(single, row))))
        rows.append(f"{tap} = {{ " + ", ".join(f"{name} = {value:.3g}" for name, value in values.items()) + " }")
    return "\n".join(rows).replace(" = 0,", " = 0.0,").replace(" = 0 }", " = 0.0 }") + "\n"


def _rounded_up(value: float) -> float:
    rounded = float(f"{value:.1e}")
    if rounded < value:
        exponent = int(f"{value:.1e}".split("e")[1])
        rounded = float(f"{rounded + 10.0 ** (exponent - 1):.1e}")
    return rounded


def _product(multiple: float, floor: float) -> float:
    return float(f"{multiple * floor:.3g}")


def inconsistent(found: dict[str, Any]) -> list[str]:
    """Lines whose tolerance is not the multiple of the floor beside it, sections that lack a tap or have multiples of
    their own."""
    problems = []
    for model, dtypes in found.items():
        for dtype, section in dtypes.items():
            where = f"[{model}.{dtype}]"
            if section["multiples"] != list(MULTIPLES[model][dtype]):
                problems.append(f"{where} has multiples that are not those of reference/tolerances.py")
            if set(TAPS) != {tap for tap, _ in lines(section)}:
                problems.append(f"{where} does not have exactly the taps of reference/taps.py")
            for tap, line in lines(section):
                for name, multiple in zip(("l2", "row"), section["multiples"]):
                    expected = _product(multiple, line[f"{name}_floor"])
                    if not line[name] <= expected * 1.001:
                        problems.append(f"{where} {tap}.{name} is {line[name]}, its floor allows {expected}")
    return problems


def loosened(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines of `new` that allow more than in `old` though the floor beside them is the same; multiples that grew, and
    what was removed."""
    problems = []
    for model, dtypes in old.items():
        for dtype, section in dtypes.items():
            other = new.get(model, {}).get(dtype)
            if other is None:
                problems.append(f"[{model}.{dtype}] was removed")
                continue
            if any(now > before for now, before in zip(other["multiples"], section["multiples"])):
                problems.append(f"[{model}.{dtype}] multiples grew; take the change back")
            for tap, line in lines(section):
                now = other.get(tap)
                if now is None:
                    problems.append(f"[{model}.{dtype}] {tap} was removed")
                    continue
                for name in ("l2", "row"):
                    same = now[f"{name}_floor"] == line[f"{name}_floor"] or other["measured"] == section["measured"]
                    if same and now[name] > line[name]:
                        problems.append(
                            f"[{model}.{dtype}] {tap}.{name} grew from {line[name]} to {now[name]} without a new "
                            "measurement; measure with python -m reference.noise or take the change back"
                        )
    return problems

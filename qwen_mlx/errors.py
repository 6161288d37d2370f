"""Errors that a person can act on: one sentence that says what, where, expected, found and the fix."""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
import operator
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

LONGEST_SENTENCE = 2000  # characters: a file's words, which a sentence may quote, can be of any length


def shortened(text: str, length: int = 300) -> str:
    """`text`, cut where it is longer than `length`, for a sentence that quotes it."""
    return text if len(text) <= length else f"{text[:length]}... ({len(text):,} characters)"


class QwenMLXError(ValueError):
    """A mistake in what the user gave. Command lines print its sentence on standard error and exit with 2."""

    def __init__(self, sentence: object = "") -> None:
        text, most = str(sentence), LONGEST_SENTENCE // 2
        if len(text) > 2 * most:
            text = f"{text[:most]} ... {text[-most:]} ({len(text):,} characters)"
        super().__init__(text)


class Stopped(BaseException):
    """The process was asked to end (SIGTERM), or its terminal is gone (SIGHUP): its argument is the signal."""


class GGUFError(QwenMLXError):
    """A GGUF file that cannot be read, or does not hold what it should; names the file and the field or tensor."""


def refuse_unknown(given: Iterable[str], known: Collection[str], kind: str = "argument") -> None:
    """Raises QwenMLXError for the first name that is not known, with the one that it may have been meant for."""
    for name in given:
        if name not in known:
            near = [other for other in known if name and other.startswith(name)]
            near = near or difflib.get_close_matches(name, known, 1, 0.5)
            fix = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(sorted(known))}."
            raise QwenMLXError(f"There is no {kind} {name!r}: {fix}")


def check_integer(name: str, value: Any, low: int, high: float, expected: str) -> int:
    """Returns an integer, NumPy's too, as an int. Raises QwenMLXError unless it is one from `low` to `high`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not low <= operator.index(value) <= high:
        raise QwenMLXError(f"{name} is {value!r}, expected {expected}.")
    return operator.index(value)


# Arguments of mlx-lm's functions, and what stands for them here.
OF_MLX_LM = {
    "sampler": "temperature=, top_k=, top_p=, min_p= and the others of SamplingSettings; generate takes it",
    "logits_processors": "logit_bias=, repetition_penalty= and the others of SamplingSettings; generate takes it",
    "max_kv_size": "prompt_cache=PromptCache(model, lambda: model.make_cache(max_size=N))",
    "kv_bits": "prompt_cache=PromptCache(model, lambda: model.make_cache(bits=8))",
    "prompt_progress_callback": "progress=",
}


def refuses_wrong_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a public function answer wrong arguments with a QwenMLXError: an unknown name with the likely one, one that
    is missing or too many with those that there are, and what its use could not bear with the kind that the annotation
    asks for. A call that succeeds is not checked."""
    signature = inspect.signature(function)
    known = [name for name in signature.parameters if name not in ("self", "cls")]
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.parameters.values())

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        unknown = [] if takes_any else [name for name in kwargs if name not in known]
        for name in unknown:
            if name in OF_MLX_LM:
                raise QwenMLXError(f"There is no argument {name!r}, which is mlx-lm's: give {OF_MLX_LM[name]}.")
        refuse_unknown(unknown, known)
        try:
            return function(*args, **kwargs)
        except QwenMLXError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError as error:
                name = function.__qualname__.removesuffix(".__init__")
                raise QwenMLXError(f"{name}: {error}; its arguments are ({', '.join(_declared(signature))}).") from None
            hints = typing.get_type_hints(function)
            for name, value in given.items():
                if name in hints and not fits(value, hints[name]):
                    kind = signature.parameters[name].annotation
                    raise QwenMLXError(f"{name} is {value!r:.80}, expected {kind}.") from None
            raise

    return call


def _declared(signature: inspect.Signature) -> list[str]:
    """A signature's names as Python writes them, without annotations, defaults and self: after "*" by name alone."""
    kinds = inspect.Parameter
    plain = [p.replace(annotation=kinds.empty, default=kinds.empty) for p in signature.parameters.values()]
    plain = [p for p in plain if p.name not in ("self", "cls")]
    names = [p.name for p in plain if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    by_name = [str(p) for p in plain if p.kind in (kinds.KEYWORD_ONLY, kinds.VAR_KEYWORD)]
    return [*names, *(["*", *by_name] if by_name else [])]


def fits(value: Any, hint: Any) -> bool:
    """True if a value is of the kind that an annotation means. NumPy's numbers are numbers, its arrays sequences."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is typing.Literal:
        return any(value is one or (type(value) is type(one) and value == one) for one in inner)
    if hint in (int, float):
        return isinstance(value, numbers.Integral if hint is int else numbers.Real) and not isinstance(value, bool)
    kind = origin or (type(None) if hint is None else hint)
    if hint is Any or not isinstance(kind, type):  # Any is a class from Python 3.11 on; a type variable is none
        return True
    if hasattr(value, "__array__") and not isinstance(value, type) and kind in (Sequence, Iterable):
        return value.ndim > 0 and (not inner or not value.size or fits(value.tolist()[0], inner[0]))
    if not isinstance(value, kind) or (isinstance(value, bytes) and kind is not bytes):
        return False
    if isinstance(value, Mapping) and len(inner) == 2:
        return all(fits(key, inner[0]) and fits(item, inner[1]) for key, item in value.items())
    if isinstance(value, list | tuple | str) and inner and kind is not tuple:
        return not isinstance(value, str) and all(fits(item, inner[0]) for item in value)
    return True

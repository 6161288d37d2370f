"""Seeded defects of the kernels that decoding one token launches."""

from __future__ import annotations

from reference.emulator import DataRace, OutOfBounds, UninitialisedRead, UnwrittenOutput

from .seeded import BARRIER, RACE, Edit, WrongNumbers

# name: (call of decoding_calls.py that must fail, the change)
EDITS: dict[str, tuple[str, Edit]] = {
    "norm before the product without its barriers": ("matvec dense", Edit("matvec.h", BARRIER, "", RACE)),
    "sums of several simdgroups without their barriers": ("matvec dense, split", Edit("matvec.h", BARRIER, "", RACE)),
    "attend without its barriers": ("attend", Edit("attend.h", BARRIER, "", RACE)),
    "matvec: rows beyond the last": (
        "matvec q4_k",
        Edit("matvec.metal", " && row < uint(ROWS)", "", (OutOfBounds, UninitialisedRead)),
    ),
    "a unit of more rows than are left": (
        "matvec q4_k",
        Edit("rows.h", "i = i < uint(COUNT) ? i : uint(COUNT - 1);", "", OutOfBounds),
    ),
    "rotation without its tail guard": ("rotation", Edit("rotation.metal", "if (i < uint(HALF)) {", "{", OutOfBounds)),
    "matvec_qkv: the tail copied over the new token": (
        "matvec_qkv dense",
        Edit("matvec_qkv.metal", "if (i / uint(2 * HALF) % uint(TAIL) != slot) {", "{", DataRace),
    ),
    "matvec_qkv: tail not copied": (
        "matvec_qkv dense",
        Edit("matvec_qkv.metal", "new_tail[i] = tail[i];", "", UnwrittenOutput),
    ),
    "attend_split: sums of weights not stored": (
        "attend_split",
        Edit("attend_split.metal", "stats[2u * at + 1u] = all.total;", "", UnwrittenOutput),
    ),
    "matvec: the first simdgroup's sum only": (
        "matvec dense, split",
        Edit("matvec.h", "for (int s = 0; s < SPLIT; ++s) {", "for (int s = 0; s < 1; ++s) {", WrongNumbers),
    ),
    "matvec_swiglu: gate by gate": (
        "matvec_swiglu dense",
        Edit("matvec_swiglu.metal", "float(T(activated)) * up", "float(T(activated)) * gate", WrongNumbers),
    ),
    "matvec_qkv: second half turned the wrong way": (
        "matvec_qkv dense",
        Edit("matvec_qkv.metal", "table[t + 1u], -a,", "table[t + 1u], a,", WrongNumbers),
    ),
    "matvec_qkv: the second matrix from the first one's unit on": (
        "matvec_qkv mixed",
        Edit("matvec_qkv.metal", "(unit - UNITS1)", "(unit)", (OutOfBounds, WrongNumbers)),
    ),
    "affine: a code's bits in the second word lost": (
        "matvec_qkv mixed",
        Edit("affine.h", "(words.v[(word + 1) % BITS] << uint(32 - shift))", "0u", WrongNumbers),
    ),
    "Q4_K: upper bits of later scales lost": (
        "matvec q4_k",
        Edit("q4_k.h", "(tops & 0x0f0fu) | ((scale >> 2) & 0x3030u)", "(tops & 0x0f0fu)", WrongNumbers),
    ),
    "Q4_K: minimum of the wrong group": (
        "unpack q4_k",
        Edit("q4_k.h", "const uint middle = (head.v[2] >> shift)", "const uint middle = head.v[2]", WrongNumbers),
    ),
    "Q6_K: highest bit only": ("matvec q6_k", Edit("q6_k.h", "top, 0x00600000u", "top, 0x00400000u", WrongNumbers)),
    "attend: a key too few in the window": (
        "attend",
        Edit("attend.h", "? end - uint(WINDOW) : 0u", "? end - uint(WINDOW) + 1u : 0u", WrongNumbers),
    ),
    "attend: keys that are not there": (
        "attend",
        Edit(
            "attend.h",
            "lane_row < end ? dot * scale : float_of_bits(int(0xff800000u))",
            "lane_row <= end ? dot * scale : float_of_bits(int(0xff800000u))",
            WrongNumbers,
        ),
    ),
    "combine: sums of weights not rescaled": (
        "attend_split",
        Edit(
            "combine.metal",
            "metal::fma(factor, stats[2u * at + 1u], total)",
            "stats[2u * at + 1u] + total",
            WrongNumbers,
        ),
    ),
}

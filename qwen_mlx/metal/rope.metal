// Turns each head of x by its position: one threadgroup for TOKENS tokens, whose angles it computes once for all heads.
// x, out (B, L, HEADS, 2 HALF) T; turns (HALF, 3) uint32, see rotary.h; offset (1) or (B) int32, the first position.
// Template: T, HEADS, HALF, N elements a pack, TOKENS, THREADS, SCALE and SCALE_LOW the attention factor's bits.
threadgroup Rotation table[TOKENS * HALF];

const uint id = thread_position_in_threadgroup.x;
const uint first = threadgroup_position_in_grid.x * uint(TOKENS);
const uint length = uint(x_shape[1]);
const uint left = uint(x_shape[0]) * length - first;
const uint tokens = left < uint(TOKENS) ? left : uint(TOKENS);
fill_table<HALF, N, THREADS>(table, turns, offset, uint(offset_shape[0]), length, first, tokens, float_of_bits(SCALE),
                             float_of_bits(SCALE_LOW), id);
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
turn_tokens<T, HEADS, 0, HALF, N, TOKENS, THREADS, false>(x, x, out, out, table, first, tokens, id);

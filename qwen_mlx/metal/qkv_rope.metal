// Splits the joined projection into q and k | v, adds its bias, and turns q and k: one threadgroup for TOKENS tokens,
// whose angles it computes once for all heads. qkv (B, L, WIDTH), bias (WIDTH), q (B, L, HEADS, 2 HALF),
// kv (B, L, 2, KV, 2 HALF), all T; turns (HALF, 3) uint32, see rotary.h; offset (1) or (B) int32, the first position.
// Template: T, HEADS, KV, HALF, N elements a pack, TOKENS, THREADS, BIAS, SCALE and SCALE_LOW the attention factor.
threadgroup Rotation table[TOKENS * HALF];

const uint id = thread_position_in_threadgroup.x;
const uint first = threadgroup_position_in_grid.x * uint(TOKENS);
const uint length = uint(qkv_shape[1]);
const uint left = uint(qkv_shape[0]) * length - first;
const uint tokens = left < uint(TOKENS) ? left : uint(TOKENS);
fill_table<HALF, N, THREADS>(table, turns, offset, uint(offset_shape[0]), length, first, tokens, float_of_bits(SCALE),
                             float_of_bits(SCALE_LOW), id);
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
turn_tokens<T, HEADS, KV, HALF, N, TOKENS, THREADS, BIAS>(qkv, bias, q, kv, table, first, tokens, id);

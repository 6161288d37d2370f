// Splits the joined projection into q and k | v, adds its bias, and turns q and k: one threadgroup for each token, whose
// angles it computes once for all heads. qkv (B, L, WIDTH), bias (WIDTH), q (B, L, HEADS, 2 HALF),
// kv (B, L, 2, KV, 2 HALF), all T; turns (HALF, 3) uint32, see rotary.h; offset (1) or (B) int32, the first position.
// Template: T, HEADS, KV, HALF, N elements a pack, THREADS, BIAS, SCALE and SCALE_LOW the attention factor.
typedef typename RotationOf<sizeof(T)>::type Angle;
threadgroup Angle table[HALF];

const uint id = thread_position_in_threadgroup.x;
const uint token = threadgroup_position_in_grid.x;
fill_table<Angle, HALF, N, THREADS>(table, turns, offset, uint(offset_shape[0]), uint(qkv_shape[1]), token,
                                    float_of_bits(SCALE), float_of_bits(SCALE_LOW), id);
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
turn_token<T, HEADS, KV, HALF, N, THREADS, BIAS>(qkv, bias, q, kv, table, token, id);

// Turns each head of x by its position: one threadgroup for each token, whose angles it computes once for all heads.
// x, out (B, L, HEADS, 2 HALF) T; turns (HALF, 3) uint32, see rotary.h; offset (1) or (B) int32, the first position.
// Template: T, HEADS, HALF, N elements a pack, THREADS, SCALE and SCALE_LOW the attention factor's bits.
typedef typename RotationOf<sizeof(T)>::type Angle;
threadgroup Angle table[HALF];

const uint id = thread_position_in_threadgroup.x;
const uint token = threadgroup_position_in_grid.x;
fill_table<Angle, HALF, N, THREADS>(table, turns, offset, uint(offset_shape[0]), uint(x_shape[1]), token,
                                    float_of_bits(SCALE), float_of_bits(SCALE_LOW), id);
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
turn_token<T, HEADS, 0, HALF, N, THREADS, false>(x, x, out, out, table, token, id);

// The Metal that the decoding kernels use, in C++ for OpenCL on AMD's target, for metal_cost.py. Instructions that an Apple
// GPU has and no plain C++ are written as assembly that only names them: they are counted by that name, and run nowhere.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define device __global
#define threadgroup __local
#define INFINITY __builtin_inff()
#define NAMED(name, result, ...) __asm volatile("; " name : "=v"(result) : __VA_ARGS__)

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef int int32_t;
typedef uint uint32_t;
typedef half float16_t;
typedef __bf16 bfloat16_t;

template <typename To, typename From>
constexpr To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: the sizes differ");
  return __builtin_bit_cast(To, from);
}

namespace metal {
template <typename T, int N>
struct vec;
template <typename T>
struct vec<T, 2> {
  T x, y;
  vec() = default;
  vec(T x, T y) : x(x), y(y) {}
  T operator[](int i) const { return i == 0 ? x : y; }
};
template <typename T>
struct vec<T, 3> {
  T x, y, z;
};
template <typename T>
struct vec<T, 4> {
  T x, y, z, w;
  vec() = default;
  vec(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
  T operator[](int i) const { return i == 0 ? x : i == 1 ? y : i == 2 ? z : w; }
};
typedef half half2 __attribute__((ext_vector_type(2)));
typedef vec<float, 2> float2;
typedef vec<uint, 2> uint2;
typedef vec<uint, 3> uint3;
typedef vec<uint, 4> uint4;

enum class mem_flags { mem_none, mem_threadgroup };
inline void threadgroup_barrier(mem_flags) { __asm volatile("; barrier" ::: "memory"); }
#define SIMD(T)                                                                                        \
  inline T simd_sum(T x) { T y; NAMED("simd_sum", y, "v"(x)); return y; }                              \
  inline T simd_max(T x) { T y; NAMED("simd_max", y, "v"(x)); return y; }                              \
  inline T simd_shuffle(T x, ushort lane) { T y; NAMED("shuffle", y, "v"(x), "v"(uint(lane))); return y; } \
  inline T simd_shuffle_xor(T x, ushort mask) { T y; NAMED("shuffle", y, "v"(x), "v"(uint(mask))); return y; }
SIMD(float)
SIMD(uint)
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float abs(float x) { return __builtin_fabsf(x); }
inline float rint(float x) { return __builtin_rintf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline float min(float a, float b) { return __builtin_fminf(a, b); }
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
inline uint max(uint a, uint b) { return a < b ? b : a; }
namespace precise {
inline float sqrt(float x) { float y; NAMED("sqrt", y, "v"(x)); return y; }
inline float exp(float x) { float y; NAMED("exp", y, "v"(x)); return y; }
}
}

// The kernels' attributes.
#define ATTRIBUTE(T, name, ...) inline T attribute_##name() { return __VA_ARGS__; }
ATTRIBUTE(uint, thread_index_in_simdgroup, __builtin_amdgcn_workitem_id_x() & 31u)
ATTRIBUTE(uint, simdgroup_index_in_threadgroup, __builtin_amdgcn_workitem_id_x() >> 5)
ATTRIBUTE(metal::uint3, thread_position_in_threadgroup, {__builtin_amdgcn_workitem_id_x(), 0u, 0u})
ATTRIBUTE(metal::uint3, threadgroup_position_in_grid, {__builtin_amdgcn_workgroup_id_x(), __builtin_amdgcn_workgroup_id_y(), 0u})
ATTRIBUTE(metal::uint3, threadgroups_per_grid, {__builtin_amdgcn_grid_size_x(), 1u, 1u})
ATTRIBUTE(metal::uint3, thread_position_in_grid,
          {__builtin_amdgcn_workgroup_id_x() * 256u + __builtin_amdgcn_workitem_id_x(), __builtin_amdgcn_workgroup_id_y(), 0u})

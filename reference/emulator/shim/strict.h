// Metal's names in C++14 for strict.py: declared, and never run.
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define INFINITY __builtin_inff()

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef uchar uint8_t;
typedef short int16_t;
typedef ushort uint16_t;
typedef int int32_t;
typedef uint uint32_t;
typedef long int64_t;
typedef ulong uint64_t;
typedef unsigned long size_t;
typedef _Float16 half;
typedef half float16_t;
typedef __bf16 bfloat;
typedef bfloat bfloat16_t;

namespace metal {
template <typename T, int N>
struct vec;
template <typename T>
struct vec<T, 2> {
  T x, y;
  vec() = default;
  vec(T x, T y);
  T operator[](int) const;
};
template <typename T>
struct vec<T, 3> {
  T x, y, z;
};
template <typename T>
struct vec<T, 4> {
  T x, y, z, w;
  vec() = default;
  vec(T x, T y, T z, T w);
  T operator[](int) const;
};
typedef vec<half, 2> half2;
typedef vec<float, 2> float2;
typedef vec<float, 4> float4;
typedef vec<uint, 2> uint2;
typedef vec<uint, 3> uint3;
typedef vec<uint, 4> uint4;

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
float fma(float, float, float);
float abs(float);
float rint(float);
bool isfinite(float);
#define PAIR(T) \
  T min(T, T);  \
  T max(T, T);
PAIR(float) PAIR(uint) PAIR(int)
#undef PAIR
#define SIMD(T)                \
  T simd_sum(T);               \
  T simd_max(T);               \
  T simd_shuffle(T, ushort);   \
  T simd_shuffle_xor(T, ushort);
SIMD(float) SIMD(uint) SIMD(int) SIMD(half)
#undef SIMD
namespace precise {
float sqrt(float);
float exp(float);
}
}
using namespace metal;

template <typename To, typename From>
constexpr To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: the sizes differ");
  return __builtin_bit_cast(To, from);
}

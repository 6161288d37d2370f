// Metal's names for clang's C++ for OpenCL, whose address spaces and restrictions are Metal's. Declarations only: the
// text is parsed, never run. bfloat is __bf16, which clang converts from float without a cast: lint.py finds those.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define device __global
#define threadgroup __local
#define thread __private
#define METAL_FUNC inline
#define __METAL__ 1
#define __METAL_VERSION__ 320
#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 2

// Names of OpenCL that Metal leaves to the kernel.
#define local local_
#define global global_
#define generic generic_
#define vec_step vec_step_
#define read_only read_only_
#define write_only write_only_
#define read_write read_write_
#define pipe pipe_
#define addrspace_cast addrspace_cast_

typedef __bf16 bfloat;
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
typedef ulong size_t;
typedef long ptrdiff_t;

#define VECTORS(T)                                    \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
VECTORS(char)
VECTORS(uchar)
VECTORS(short)
VECTORS(ushort)
VECTORS(int)
VECTORS(uint)
VECTORS(long)
VECTORS(ulong)
VECTORS(half)
VECTORS(bfloat)
VECTORS(float)
#undef VECTORS
// Comparisons of vectors give vectors of integers here.
typedef int2 bool2;
typedef int3 bool3;
typedef int4 bool4;
// float2(x, y): clang has the form (float2)(x, y) only.
#define char2(...) ((char2)(__VA_ARGS__))
#define char3(...) ((char3)(__VA_ARGS__))
#define char4(...) ((char4)(__VA_ARGS__))
#define uchar2(...) ((uchar2)(__VA_ARGS__))
#define uchar3(...) ((uchar3)(__VA_ARGS__))
#define uchar4(...) ((uchar4)(__VA_ARGS__))
#define short2(...) ((short2)(__VA_ARGS__))
#define short3(...) ((short3)(__VA_ARGS__))
#define short4(...) ((short4)(__VA_ARGS__))
#define ushort2(...) ((ushort2)(__VA_ARGS__))
#define ushort3(...) ((ushort3)(__VA_ARGS__))
#define ushort4(...) ((ushort4)(__VA_ARGS__))
#define int2(...) ((int2)(__VA_ARGS__))
#define int3(...) ((int3)(__VA_ARGS__))
#define int4(...) ((int4)(__VA_ARGS__))
#define uint2(...) ((uint2)(__VA_ARGS__))
#define uint3(...) ((uint3)(__VA_ARGS__))
#define uint4(...) ((uint4)(__VA_ARGS__))
#define long2(...) ((long2)(__VA_ARGS__))
#define long3(...) ((long3)(__VA_ARGS__))
#define long4(...) ((long4)(__VA_ARGS__))
#define ulong2(...) ((ulong2)(__VA_ARGS__))
#define ulong3(...) ((ulong3)(__VA_ARGS__))
#define ulong4(...) ((ulong4)(__VA_ARGS__))
#define half2(...) ((half2)(__VA_ARGS__))
#define half3(...) ((half3)(__VA_ARGS__))
#define half4(...) ((half4)(__VA_ARGS__))
#define bfloat2(...) ((bfloat2)(__VA_ARGS__))
#define bfloat3(...) ((bfloat3)(__VA_ARGS__))
#define bfloat4(...) ((bfloat4)(__VA_ARGS__))
#define float2(...) ((float2)(__VA_ARGS__))
#define float3(...) ((float3)(__VA_ARGS__))
#define float4(...) ((float4)(__VA_ARGS__))
#define bool2(...) ((bool2)(__VA_ARGS__))
#define bool3(...) ((bool3)(__VA_ARGS__))
#define bool4(...) ((bool4)(__VA_ARGS__))

#define HALF_MAX 65504.0h
#define FLT_MAX 3.40282346638528859812e+38f
#define FLT_MIN 1.17549435082228750797e-38f
#define FLT_EPSILON 1.1920928955078125e-7f
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define M_PI_F 3.14159274101257324219f
#define M_PI_2_F 1.57079637050628662109f
#define M_E_F 2.71828174591064453125f
#define M_LOG2E_F 1.44269502162933349609f
#define M_LN2_F 0.693147182464599609375f
#define M_SQRT2_F 1.41421353816986083984f
#define M_1_PI_F 0.318309873342514038086f

namespace metal {

using ::ptrdiff_t;
using ::size_t;

template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));

#define FLAG static constexpr __constant bool
template <bool B, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool B, typename T = void>
using enable_if_t = typename enable_if<B, T>::type;
template <bool B, typename T, typename U>
struct conditional {
  typedef U type;
};
template <typename T, typename U>
struct conditional<true, T, U> {
  typedef T type;
};
template <bool B, typename T, typename U>
using conditional_t = typename conditional<B, T, U>::type;
template <typename T, typename U>
FLAG is_same_v = __is_same(T, U);
template <typename T, typename U>
FLAG is_convertible_v = __is_convertible_to(T, U);
template <typename T>
FLAG is_integral_v = __is_integral(T);
template <typename T>
FLAG is_floating_point_v = __is_floating_point(T);
template <typename T>
FLAG is_signed_v = __is_signed(T);
template <typename T>
FLAG is_unsigned_v = __is_unsigned(T);
template <typename T>
FLAG is_pointer_v = __is_pointer(T);
#undef FLAG

template <typename T>
struct numeric_limits {
  static constexpr T value() { return T(1); }
  static constexpr T min() { return value(); }
  static constexpr T max() { return value(); }
  static constexpr T lowest() { return value(); }
  static constexpr T infinity() { return value(); }
  static constexpr T quiet_NaN() { return value(); }
  static constexpr T denorm_min() { return value(); }
  static constexpr T epsilon() { return value(); }
  static constexpr __constant int digits = 0;
};

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

#define MATH1(name) \
  float name(float); \
  half name(half); \
  template <int N> vec<float, N> name(vec<float, N>); \
  template <int N> vec<half, N> name(vec<half, N>);
#define MATH2(name) \
  float name(float, float); \
  half name(half, half); \
  template <int N> vec<float, N> name(vec<float, N>, vec<float, N>); \
  template <int N> vec<half, N> name(vec<half, N>, vec<half, N>);
#define MATH3(name) \
  float name(float, float, float); \
  half name(half, half, half);
#define MATHEMATICS                                                                                                    \
  MATH1(abs) MATH1(fabs) MATH1(acos) MATH1(acosh) MATH1(asin) MATH1(asinh) MATH1(atan) MATH1(atanh) MATH1(ceil)        \
  MATH1(cos) MATH1(cosh) MATH1(cospi) MATH1(exp) MATH1(exp10) MATH1(exp2) MATH1(floor) MATH1(fract) MATH1(log)         \
  MATH1(log10) MATH1(log2) MATH1(rint) MATH1(round) MATH1(rsqrt) MATH1(sin) MATH1(sinh) MATH1(sinpi) MATH1(sqrt)       \
  MATH1(tan) MATH1(tanh) MATH1(tanpi) MATH1(trunc) MATH1(saturate) MATH1(sign) MATH2(atan2) MATH2(divide) MATH2(fmax)  \
  MATH2(fmin) MATH2(fmod) MATH2(pow) MATH2(powr) MATH2(nextafter) MATH2(copysign) MATH2(max) MATH2(min) MATH2(fdim)    \
  MATH3(fmax3) MATH3(fmin3) MATH3(max3) MATH3(min3) MATH3(median3) MATH3(fmedian3) MATH3(clamp) MATH3(fma) MATH3(mix)  \
  MATH3(smoothstep) MATH2(step) float ldexp(float, int);                                                               \
  half ldexp(half, int);                                                                                               \
  float frexp(float, thread int&);                                                                                     \
  float modf(float, thread float&);                                                                                    \
  float sincos(float, thread float&);
MATHEMATICS
namespace fast {
MATHEMATICS
}
namespace precise {
MATHEMATICS
}
#define INTEGER(T)                                                             \
  constexpr T max(T a, T b) { return a < b ? b : a; }                          \
  constexpr T min(T a, T b) { return b < a ? b : a; }                          \
  T clamp(T, T, T); T popcount(T); T clz(T); T ctz(T); T rotate(T, T);
INTEGER(char)
INTEGER(int8_t)
INTEGER(uchar)
INTEGER(short)
INTEGER(ushort)
INTEGER(int)
INTEGER(uint)
INTEGER(long)
INTEGER(ulong)
int abs(int);
long abs(long);
short abs(short);
uint mulhi(uint, uint);
int mulhi(int, int);
ulong mulhi(ulong, ulong);
long mulhi(long, long);
uint absdiff(uint, uint);
uint extract_bits(uint, uint, uint);
uint reverse_bits(uint);
#define CLASSIFY(name) \
  bool name(float);    \
  bool name(half);     \
  bool name(bfloat);
CLASSIFY(isfinite)
CLASSIFY(isinf)
CLASSIFY(isnan)
CLASSIFY(isnormal)
CLASSIFY(signbit)
template <typename T>
T select(T, T, bool);
template <typename T, typename B, int N>
vec<T, N> select(vec<T, N>, vec<T, N>, vec<B, N>);
template <typename B, int N>
bool all(vec<B, N>);
template <typename B, int N>
bool any(vec<B, N>);
template <typename T, int N>
T dot(vec<T, N>, vec<T, N>);
template <typename T, int N>
T length(vec<T, N>);
template <typename T, int N>
T length_squared(vec<T, N>);
template <typename T, int N>
T distance(vec<T, N>, vec<T, N>);
template <typename T, int N>
vec<T, N> normalize(vec<T, N>);
template <typename T>
vec<T, 3> cross(vec<T, 3>, vec<T, 3>);

// A vector without padding.
template <typename T, int N>
struct packed_vec {
  T v[N];
  packed_vec() = default;
  packed_vec(vec<T, N>);
  packed_vec(T);
  packed_vec(T, T);
  packed_vec(T, T, T);
  packed_vec(T, T, T, T);
  operator vec<T, N>() const;
  operator vec<T, N>() const constant;
  T operator[](size_t) const;
  T operator[](size_t) const constant;
  device T& operator[](size_t) device;
  threadgroup T& operator[](size_t) threadgroup;
  thread T& operator[](size_t) thread;
};
#define PACKED(T) \
  typedef packed_vec<T, 2> packed_##T##2; \
  typedef packed_vec<T, 3> packed_##T##3; \
  typedef packed_vec<T, 4> packed_##T##4;
PACKED(char)
PACKED(uchar)
PACKED(short)
PACKED(ushort)
PACKED(int)
PACKED(uint)
PACKED(long)
PACKED(half)
PACKED(bfloat)
PACKED(float)
#undef PACKED

// Overloads, not templates for any T: MLX's preamble adds bfloat's own.
#define SIMD(T)                                                                                                        \
  T simd_sum(T); T simd_product(T); T simd_max(T); T simd_min(T); T simd_shuffle(T, ushort); T simd_broadcast(T, ushort); \
  T simd_broadcast_first(T); T simd_shuffle_xor(T, ushort); T simd_shuffle_down(T, ushort); T simd_shuffle_up(T, ushort); \
  T simd_shuffle_rotate_down(T, ushort); T simd_shuffle_rotate_up(T, ushort);                                          \
  T simd_shuffle_and_fill_down(T, T, ushort); T simd_shuffle_and_fill_up(T, T, ushort);                                \
  T simd_shuffle_and_fill_down(T, T, ushort, ushort); T simd_shuffle_and_fill_up(T, T, ushort, ushort);                \
  T simd_prefix_inclusive_sum(T); T simd_prefix_exclusive_sum(T); T simd_prefix_inclusive_product(T);                  \
  T simd_prefix_exclusive_product(T); T quad_sum(T); T quad_max(T); T quad_min(T); T quad_shuffle(T, ushort);          \
  T quad_broadcast(T, ushort); T quad_shuffle_xor(T, ushort);
SIMD(char)
SIMD(uchar)
SIMD(short)
SIMD(ushort)
SIMD(int)
SIMD(uint)
SIMD(half)
SIMD(float)
SIMD(uint2)
SIMD(uint4)
SIMD(int2)
SIMD(float2)
SIMD(float3)
SIMD(float4)
SIMD(half2)
SIMD(half4)
#define SIMD_BITS(T) \
  T simd_and(T);     \
  T simd_or(T);      \
  T simd_xor(T);
SIMD_BITS(int)
SIMD_BITS(uint)
SIMD_BITS(ushort)
bool simd_all(bool);
bool simd_any(bool);
bool simd_is_first();
struct simd_vote {
  typedef ulong vote_t;
  vote_t bits;
  explicit constexpr simd_vote(vote_t b = 0) : bits(b) {}
  explicit operator vote_t() const thread { return bits; }
  bool all() const thread;
  bool any() const thread;
};
simd_vote simd_ballot(bool);

enum memory_order { memory_order_relaxed };
template <typename T>
struct atomic {
  T value;
};
// Macros, as OpenCL has types of these names.
#define atomic_int atomic<int>
#define atomic_uint atomic<uint>
#define atomic_bool atomic<bool>
#define atomic_float atomic<float>
#define atomic_ulong atomic<ulong>
template <typename T>
struct identity {
  typedef T type;
};
#define ATOMIC(space, name) \
  template <typename T> T atomic_##name##_explicit(space volatile atomic<T>*, typename identity<T>::type, memory_order);
#define ATOMICS(space)                                                                                        \
  template <typename T> T atomic_load_explicit(const space volatile atomic<T>*, memory_order);                \
  template <typename T> void atomic_store_explicit(space volatile atomic<T>*, typename identity<T>::type, memory_order); \
  template <typename T> bool atomic_compare_exchange_weak_explicit(                                           \
      space volatile atomic<T>*, thread T*, typename identity<T>::type, memory_order, memory_order);          \
  ATOMIC(space, exchange) ATOMIC(space, fetch_add) ATOMIC(space, fetch_sub) ATOMIC(space, fetch_max)          \
  ATOMIC(space, fetch_min) ATOMIC(space, fetch_and) ATOMIC(space, fetch_or) ATOMIC(space, fetch_xor)
ATOMICS(device)
ATOMICS(threadgroup)

struct os_log {
  constexpr os_log(constant char*, constant char*) constant {}
  template <typename... Args>
  void log_debug(constant char*, Args...) const constant {}
  template <typename... Args>
  void log_debug(constant char*, Args...) const thread {}
};

}  // namespace metal

template <typename To, typename From>
constexpr To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: the sizes differ");
  return __builtin_bit_cast(To, from);
}

// The compiler's own functions, which MLX's preamble calls for bfloat.
#define BUILTIN1(name) float __metal_##name(float, int = 0);
#define BUILTIN2(name) float __metal_##name(float, float, int = 0);
#define BUILTIN3(name) float __metal_##name(float, float, float, int = 0);
BUILTIN1(fabs) BUILTIN1(acos) BUILTIN1(acosh) BUILTIN1(asin) BUILTIN1(asinh) BUILTIN1(atan) BUILTIN1(atanh)
BUILTIN1(ceil) BUILTIN1(cos) BUILTIN1(cosh) BUILTIN1(cospi) BUILTIN1(exp) BUILTIN1(exp10) BUILTIN1(exp2)
BUILTIN1(floor) BUILTIN1(fract) BUILTIN1(log) BUILTIN1(log10) BUILTIN1(log2) BUILTIN1(rint) BUILTIN1(round)
BUILTIN1(rsqrt) BUILTIN1(sin) BUILTIN1(sinh) BUILTIN1(sinpi) BUILTIN1(sqrt) BUILTIN1(tan) BUILTIN1(tanh)
BUILTIN1(tanpi) BUILTIN1(trunc) BUILTIN2(atan2) BUILTIN2(divide) BUILTIN2(fmax) BUILTIN2(fmin) BUILTIN2(fmod)
BUILTIN2(pow) BUILTIN2(powr) BUILTIN2(nextafter) BUILTIN3(fma) BUILTIN3(fmax3) BUILTIN3(fmin3) BUILTIN3(fmedian3)
float __metal_ldexp(float, int, int = 0);
float __metal_frexp(float, thread int*);
ushort __metal_get_simdgroup_size(ushort);
#define SIMD1(name) \
  template <typename T> T __metal_simd_##name(T);
#define SIMD2(name) \
  template <typename T> T __metal_simd_##name(T, ushort);
#define SIMD3(name) \
  template <typename T> T __metal_simd_##name(T, T, ushort, ushort);
SIMD1(sum) SIMD1(product) SIMD1(max) SIMD1(min) SIMD1(xor) SIMD1(prefix_inclusive_sum) SIMD1(prefix_exclusive_sum)
SIMD1(prefix_inclusive_product) SIMD1(prefix_exclusive_product) SIMD2(broadcast) SIMD2(shuffle) SIMD2(shuffle_down)
SIMD2(shuffle_up) SIMD2(shuffle_xor) SIMD2(shuffle_rotate_down) SIMD2(shuffle_rotate_up)
SIMD3(shuffle_and_fill_down) SIMD3(shuffle_and_fill_up)
#undef MATH1
#undef MATH2
#undef MATH3
#undef MATHEMATICS
#undef INTEGER
#undef CLASSIFY
#undef SIMD
#undef SIMD_BITS
#undef ATOMIC
#undef ATOMICS
#undef BUILTIN1
#undef BUILTIN2
#undef BUILTIN3
#undef SIMD1
#undef SIMD2
#undef SIMD3

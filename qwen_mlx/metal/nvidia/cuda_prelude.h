// Metal's names, and metal_prelude.h's, in CUDA, so that NVRTC compiles the same kernel bodies.
#define FUNCTION __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define SIMD_WIDTH 32
#define INFINITY __int_as_float(0x7f800000)
#define threadgroup __shared__
#define thread_position_in_threadgroup threadIdx
#define threadgroup_position_in_grid blockIdx
#define threadgroups_per_grid gridDim
#define thread_position_in_grid \
  make_uint3(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, 0u)
#define thread_index_in_simdgroup (threadIdx.x & 31u)
#define simdgroup_index_in_threadgroup (threadIdx.x >> 5)

typedef unsigned int uint;
typedef unsigned long ulong;
typedef unsigned short ushort;
static_assert(sizeof(ulong) == 8, "long has 64 bits in Metal");

template <typename To, typename From>
FUNCTION To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: the sizes differ");
  return *reinterpret_cast<const To*>(&from);
}

namespace metal {
template <typename T, int N>
struct vec;
template <typename T>
struct vec<T, 2> {
  T x, y;
  vec() = default;
  FUNCTION vec(T x, T y) : x(x), y(y) {}
  FUNCTION T operator[](int i) const { return i == 0 ? x : y; }
};
template <typename T>
struct vec<T, 4> {
  T x, y, z, w;
  vec() = default;
  FUNCTION vec(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
  FUNCTION T operator[](int i) const { return i == 0 ? x : i == 1 ? y : i == 2 ? z : w; }
};
typedef vec<float, 2> float2;
typedef vec<uint, 2> uint2;
typedef vec<uint, 4> uint4;

enum class mem_flags { mem_none, mem_threadgroup };
FUNCTION void threadgroup_barrier(mem_flags) { __syncthreads(); }
FUNCTION void simdgroup_barrier(mem_flags) { __syncwarp(); }
FUNCTION float simd_shuffle(float x, ushort lane) { return __shfl_sync(0xffffffffu, x, lane); }
FUNCTION float simd_shuffle_xor(float x, ushort mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
FUNCTION uint simd_shuffle_xor(uint x, ushort mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
FUNCTION float simd_sum(float x) {
  for (int step = 16; step > 0; step >>= 1) {
    x += simd_shuffle_xor(x, step);
  }
  return x;
}
FUNCTION float simd_max(float x) {
  for (int step = 16; step > 0; step >>= 1) {
    x = fmaxf(x, simd_shuffle_xor(x, step));
  }
  return x;
}
// Intrinsics with a stated rounding, which no compiler option can loosen.
FUNCTION float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FUNCTION float abs(float x) { return fabsf(x); }
FUNCTION float rint(float x) { return rintf(x); }
FUNCTION float min(float a, float b) { return fminf(a, b); }
FUNCTION float max(float a, float b) { return fmaxf(a, b); }
FUNCTION uint max(uint a, uint b) { return a < b ? b : a; }
FUNCTION bool isfinite(float x) { return fabsf(x) < INFINITY; }
namespace precise {
FUNCTION float sqrt(float x) { return __fsqrt_rn(x); }
FUNCTION float exp(float x) { return expf(x); }
}
}

template <int N>
struct Pack {
  float v[N];
};

template <int N>
struct Words {
  uint v[N];
};

// A pointer to an array that begins at a multiple of 16 bytes. Kernel.source wraps a kernel's arrays in it after it has asked once
// where they lie, so that nothing stands between the loads.
template <typename T>
struct Aligned {
  T* pointer;
  FUNCTION T& operator[](uint i) const { return pointer[i]; }
};

template <typename T>
FUNCTION Aligned<T> aligned(T* pointer) {
  return {pointer};
}

FUNCTION bool all_aligned() {
  return true;
}
template <typename T, typename... Rest>
FUNCTION bool all_aligned(const T* pointer, Rest... rest) {
  return reinterpret_cast<size_t>(pointer) % 16 == 0 && all_aligned(rest...);
}

template <int N, typename T>
FUNCTION Pack<N> load(Aligned<T> from, uint index) {
  constexpr bool WHOLE = N * sizeof(T) == 16;
  uint4 raw;
  if (WHOLE) {
    raw = *reinterpret_cast<const uint4*>(from.pointer + index);
  }
  const T* elements = WHOLE ? reinterpret_cast<const T*>(&raw) : from.pointer + index;
  Pack<N> pack;
  UNROLL
  for (int k = 0; k < N; ++k) {
    pack.v[k] = float(elements[k]);
  }
  return pack;
}

template <int N, typename T>
FUNCTION Pack<N> load(T* from, uint index) {
  if (N * sizeof(T) == 16 && all_aligned(from + index)) {
    return load<N>(aligned(from), index);
  }
  Pack<N> pack;
  UNROLL
  for (int k = 0; k < N; ++k) {
    pack.v[k] = float(from[index + k]);
  }
  return pack;
}

template <int N, typename T>
FUNCTION Pack<N> load_aligned(T* from, uint index) {
  return load<N>(aligned(from), index);
}

FUNCTION metal::uint4 load_uint4(Aligned<const uint> from, uint index) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from.pointer + index);
  return metal::uint4(raw.x, raw.y, raw.z, raw.w);
}
FUNCTION metal::uint4 load_uint4(const uint* from, uint index) {
  return metal::uint4(from[index], from[index + 1u], from[index + 2u], from[index + 3u]);
}

template <typename Pointer>
FUNCTION metal::uint2 load_uint2(Pointer from, uint index) {
  return metal::uint2(from[index], from[index + 1u]);
}

template <int N, typename Pointer>
FUNCTION Words<N> load_words(Pointer from, uint index) {
  Words<N> words;
  UNROLL
  for (int k = 0; k < N; ++k) {
    words.v[k] = N % 4 == 0 ? load_uint4(from, index + k / 4 * 4)[k % 4] : from[index + k];
  }
  return words;
}

// Two numbers rounded to 16 bits in one instruction; each alone would take a slower one. The last argument is the type's.
FUNCTION uint rounded_pair(float low, float high, __nv_bfloat16) {
  return as_type<uint>(__floats2bfloat162_rn(low, high));
}
FUNCTION uint rounded_pair(float low, float high, __half) {
  return as_type<uint>(__floats2half2_rn(low, high));
}
FUNCTION uint rounded_pair(float low, float, float) {
  return __float_as_uint(low);
}

template <typename T, int N>
FUNCTION void store(Aligned<T> to, uint index, Pack<N> pack) {
  if (N * sizeof(T) == 16) {
    constexpr int STEP = N / 4 == 0 ? 1 : N / 4;  // elements of a word
    uint words[4];
    UNROLL
    for (int i = 0; i < 4; ++i) {
      words[i] = rounded_pair(pack.v[i * STEP % N], pack.v[(i * STEP + 1) % N], T());
    }
    *reinterpret_cast<uint4*>(to.pointer + index) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
    UNROLL
    for (int k = 0; k < N; ++k) {
      to[index + k] = T(pack.v[k]);
    }
  }
}

template <typename T, int N>
FUNCTION void store(T* to, uint index, Pack<N> pack) {
  if (N * sizeof(T) == 16 && all_aligned(to + index)) {
    store<T>(aligned(to), index, pack);
  } else {
    UNROLL
    for (int k = 0; k < N; ++k) {
      to[index + k] = T(pack.v[k]);
    }
  }
}

FUNCTION metal::float2 halves(uint word) {
  const float2 pair = __half22float2(as_type<__half2>(word));
  return metal::float2(pair.x, pair.y);
}

// One instruction; two constants would make it two.
FUNCTION uint masked_or(uint word, uint mask, uint bits) {
  uint result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
}

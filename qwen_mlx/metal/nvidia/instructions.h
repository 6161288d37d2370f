// NVIDIA's instructions that the tiles are made of; reference/emulator/shim/nvidia_instructions.h says the same in Metal.
typedef __nv_bfloat16 bfloat16_t;

// Rounds each element to T, to nearest even.
template <typename T, int N>
FUNCTION Pack<N> rounded(Pack<N> pack) {
  constexpr int STEP = sizeof(T) == 2 && N % 2 == 0 ? 2 : 1;
  UNROLL
  for (int k = 0; k < N; k += STEP) {
    if (STEP == 2) {
      const uint pair = rounded_pair(pack.v[k], pack.v[(k + 1) % N], T());
      const T* elements = reinterpret_cast<const T*>(&pair);
      pack.v[k] = float(elements[0]);
      pack.v[(k + 1) % N] = float(elements[STEP - 1]);
    } else {
      pack.v[k] = float(T(pack.v[k]));
    }
  }
  return pack;
}

// The 8 elements of 16 bits from `index` on, as they are.
template <typename T>
FUNCTION metal::uint4 load_halves(Aligned<T> from, uint index) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from.pointer + index);
  return metal::uint4(raw.x, raw.y, raw.z, raw.w);
}
template <typename T>
FUNCTION metal::uint4 load_halves(T* from, uint index) {
  const ushort* halves = reinterpret_cast<const ushort*>(from + index);
  uint words[4];
  UNROLL
  for (int k = 0; k < 4; ++k) {
    words[k] = uint(halves[2 * k]) | (uint(halves[2 * k + 1]) << 16);
  }
  return metal::uint4(words[0], words[1], words[2], words[3]);
}

// The same from a multiple of 16 bytes on; and 4 words from there, or 2 from a multiple of 8.
template <typename T>
FUNCTION metal::uint4 load_aligned_halves(T* from, uint index) {
  return load_halves(aligned(from), index);
}
FUNCTION metal::uint4 four_words(const uint* from, uint index) {
  return load_uint4(aligned(from), index);
}
FUNCTION metal::uint2 two_words(const uint* from, uint index) {
  const uint2 raw = *reinterpret_cast<const uint2*>(from + index);
  return metal::uint2(raw.x, raw.y);
}

// Copies one element to element k from word `at` of threadgroup memory on.
template <typename T>
FUNCTION void put_element(uint* ring, uint at, uint k, const T* from, uint index) {
  reinterpret_cast<T*>(ring + at)[k] = from[index];
}
template <typename T>
FUNCTION void put_element(uint* ring, uint at, uint k, Aligned<const T> from, uint index) {
  put_element(ring, at, k, from.pointer, index);
}

// Starts to copy N elements to word `at` of threadgroup memory. They are there for this thread after end_batch and
// wait_for_batches, for its simdgroup after a barrier. What is not aligned is copied at once.
template <int N, typename T>
FUNCTION void start_copy(uint* ring, uint at, Aligned<T> from, uint index) {
  constexpr int BYTES = N * sizeof(T);
  const uint to = static_cast<uint>(__cvta_generic_to_shared(ring + at));
  if (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from.pointer + index) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from.pointer + index), "n"(BYTES == 8 ? 8 : 4)
                 : "memory");
  }
}
template <int N, typename T>
FUNCTION void start_copy(uint* ring, uint at, T* from, uint index) {
  UNROLL
  for (int k = 0; k < N; ++k) {
    put_element(ring, at, k, from, index + k);
  }
}

FUNCTION void end_batch() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until no more than the N newest batches are under way.
template <int N>
FUNCTION void wait_for_batches() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Element i of those from word `at` of threadgroup memory on; the last argument is of their type.
template <typename T>
FUNCTION float element_of(const uint* ring, uint at, uint i, T) {
  return float(reinterpret_cast<const T*>(ring + at)[i]);
}

// The lower halves of two words, or their upper halves.
FUNCTION uint lower_halves(uint a, uint b) {
  return __byte_perm(a, b, 0x5410);
}
FUNCTION uint upper_halves(uint a, uint b) {
  return __byte_perm(a, b, 0x7632);
}

// sum + rows times columns for tiles of 16-bit numbers; tiles.h says who holds what. The last argument is of their type.
#define TILE_PRODUCT(TYPE, PTX)                                                                                              \
  FUNCTION Pack<4> tile_product(Pack<4> sum, metal::uint4 rows, metal::uint2 columns, uint, TYPE) {                          \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." PTX "." PTX ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"    \
        : "+f"(sum.v[0]), "+f"(sum.v[1]), "+f"(sum.v[2]), "+f"(sum.v[3])                                                     \
        : "r"(rows.x), "r"(rows.y), "r"(rows.z), "r"(rows.w), "r"(columns.x), "r"(columns.y));                               \
    return sum;                                                                                                              \
  }
TILE_PRODUCT(__nv_bfloat16, "bf16")
TILE_PRODUCT(__half, "f16")

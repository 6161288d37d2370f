// Cosine and sine of a position's angle, exact to about 2^-48, each as a sum of two floats: float32 arithmetic on the
// angle itself would be wrong by 0.03 radians at position 1,000,000.
struct alignas(16) Rotation {
  float cos_high, cos_low, sin_high, sin_low;
};

// The upper 64 bits of a * b, at most 3 too small.
FUNCTION ulong multiply_high(ulong a, ulong b) {
  const ulong a_high = a >> 32;
  const ulong b_high = b >> 32;
  const ulong a_low = a & 0xfffffffful;
  const ulong b_low = b & 0xfffffffful;
  return a_high * b_high + ((a_high * b_low) >> 32) + ((a_low * b_high) >> 32);
}

// high, middle and low: the turns a position makes in units of 2^-96, 32 bits each. Products wrap at whole turns, so
// the range reduction is exact for every int32 position. scale multiplies both (YaRN's attention factor).
FUNCTION Rotation rotation(uint high, uint middle, uint low, int position, float scale, float scale_low) {
  const ulong turns = (ulong(high) << 32) | ulong(middle);
  const ulong phase = turns * ulong(long(position)) + ulong((long(low) * long(position)) >> 32);
  // Eighths of a turn; the fraction of one, counted from its even end, in units of 2^-64, and its square.
  const uint octant = uint(phase >> 61);
  const ulong fraction = phase << 3;
  const bool backwards = (octant & 1u) == 1u;
  const ulong x = backwards ? ~fraction : fraction;
  const ulong y = multiply_high(x, x);
  // Taylor's series of cos(x pi / 4) and sin(x pi / 4), coefficients and sums in units of 2^-62.
  ulong c = 0x00000000001b6e25ul;
  c = 0x000000001f9d38a3ul - multiply_high(c, y);
  c = 0x0000001a6d1f2a20ul - multiply_high(c, y);
  c = 0x00000f0fa83448ddul - multiply_high(c, y);
  c = 0x0005574f1f8f2ffeul - multiply_high(c, y);
  c = 0x0103c1f081b5ac3bul - multiply_high(c, y);
  c = 0x13bd3cc9be45de5aul - multiply_high(c, y);
  c = 0x4000000000000000ul - multiply_high(c, y);
  ulong s = 0x0000000000016faeul;
  s = 0x0000000001e8f435ul - multiply_high(s, y);
  s = 0x00000001e3074fdful - multiply_high(s, y);
  s = 0x00000150783487eeul - multiply_high(s, y);
  s = 0x00009969667315ecul - multiply_high(s, y);
  s = 0x0028cd78ceeb55c4ul - multiply_high(s, y);
  s = 0x052aef39896f94b0ul - multiply_high(s, y);
  s = 0x3243f6a8885a308dul - multiply_high(s, y);
  s = multiply_high(s, x);
  // Octants 1, 2, 5 and 6 swap the two; cosine is negative in 2 to 5, sine in 4 to 7.
  const bool swapped = ((octant + 1u) & 2u) == 2u;
  long cosine = long(swapped ? s : c);
  long sine = long(swapped ? c : s);
  cosine = (octant >= 2u && octant < 6u) ? -cosine : cosine;
  sine = octant >= 4u ? -sine : sine;

  const float unit = 2.16840434e-19f;  // 2^-62
  const float c_high = float(cosine) * unit;
  const float s_high = float(sine) * unit;
  const float c_low = float(cosine - long(float(cosine))) * unit;
  const float s_low = float(sine - long(float(sine))) * unit;
  Rotation r;
  r.cos_high = c_high * scale;
  r.sin_high = s_high * scale;
  r.cos_low = metal::fma(c_high, scale, -r.cos_high) + metal::fma(c_low, scale, c_high * scale_low);
  r.sin_low = metal::fma(s_high, scale, -r.sin_high) + metal::fma(s_low, scale, s_high * scale_low);
  return r;
}

// a (c + c_low) - b (s + s_low), to 2 ulp however much cancels (Kahan's difference of products, Jeannerod et al. 2013).
FUNCTION float difference(float a, float c, float c_low, float b, float s, float s_low) {
  const float product = b * s;
  const float lost = metal::fma(b, s, -product);
  const float y = metal::fma(a, c, -product);
  const float more = metal::fma(a, c_low, -(b * s_low));
  return metal::isfinite(y) ? y + (more - lost) : y;
}

// Where angle i of each HALF lies in a table: neighbouring threads, N angles apart, read neighbouring entries,
// which keeps them in different banks of threadgroup memory.
template <int N, int HALF>
FUNCTION uint slot(uint i) {
  const uint j = i % uint(HALF);
  return i - j + j % uint(N) * uint(HALF / N) + j / uint(N);
}

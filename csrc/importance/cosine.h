// 1 - cos of two rows from sums of products that were added up in fp32.
#pragma once

namespace minitron {

// Of the rows x and y, with d = y - x.
struct PairSums {
  double xx, xy, yy, xd, dd;
};

// norms: |x| |y|. A block turns its input only a little, and 1 - xy / norms in fp32 has no digits below 1e-7.
// So where y is nearer to x than to 0, this is sin^2 / (1 + cos): sin^2 = (xx dd - xd^2) / (xx yy) keeps its
// digits, relative to dd / yy.
constexpr double cosine_distance(const PairSums& sums, double norms) {
  if (norms == 0) return 1;
  const double distance = sums.dd < sums.yy
                              ? (sums.xx * sums.dd - sums.xd * sums.xd) / (norms * (norms + sums.xy))
                              : (norms - sums.xy) / norms;
  return distance < 0 ? 0 : distance;  // rounding; a NaN stays one
}

}  // namespace minitron

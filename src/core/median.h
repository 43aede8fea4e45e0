#pragma once
#include <algorithm>
#include <vector>

namespace entrain {

/// Of at least one value; the mean of the middle two of an even number.
inline double median(std::vector<double> values) {
  const auto middle = values.begin() + std::ssize(values) / 2;
  std::ranges::nth_element(values, middle);
  if (values.size() % 2 == 1) return *middle;
  return (*middle + *std::max_element(values.begin(), middle)) / 2;
}

}  // namespace entrain

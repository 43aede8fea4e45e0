#include "core/stopwatch.h"

namespace entrain {

void Stopwatch::reset() {
  seconds_ = 0;
  used_ = 0;
}

void Stopwatch::start() {
  if (device_ == Device::cpu) {
    begin_ = std::chrono::steady_clock::now();
    return;
  }
  if (used_ == laps_.size()) laps_.emplace_back();
  laps_[used_].begin.record();
}

void Stopwatch::stop() {
  if (device_ == Device::cpu) {
    seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
    return;
  }
  laps_[used_++].end.record();
}

double Stopwatch::seconds() const {
  double sum = seconds_;
  for (size_t i = 0; i < used_; ++i) sum += laps_[i].end.seconds_since(laps_[i].begin);
  return sum;
}

}  // namespace entrain

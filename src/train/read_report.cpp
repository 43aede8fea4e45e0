#include "train/read_report.h"

#include <algorithm>

#include "kernels/kernels.h"

namespace entrain {
namespace {

HeadRead ratios(const double* fields) {
  if (fields[read_causal] == 0) return {};
  return {fields[read_pairs] / fields[read_causal], fields[read_router] / fields[read_causal],
          fields[read_blocks] / fields[read_queries]};
}

}  // namespace

ReadReport collect_read(Comm& comm, Tensor read) {
  double* fields = read.ptr<double>();
  comm.sum(fields, static_cast<int>(read.numel()));
  ReadReport report;
  double total[read_fields] = {};
  for (int64_t layer = 0; layer < read[0]; ++layer) {
    report.heads.emplace_back();
    for (int64_t head = 0; head < read[1]; ++head, fields += read_fields) {
      report.heads.back().push_back(ratios(fields));
      for (int i = 0; i < read_fields; ++i) total[i] += fields[i];
    }
  }
  report.all = ratios(total);
  std::fill_n(read.ptr<double>(), read.numel(), 0.0);
  return report;
}

}  // namespace entrain

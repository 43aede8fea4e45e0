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

void collect_read(Comm& comm, Mirror& counters, ReadReport& report) {
  counters.download();
  const Tensor read = counters.host();
  double* fields = read.ptr<double>();
  comm.sum(fields, static_cast<int>(read.numel()));
  report.heads.resize(static_cast<size_t>(read[0]));
  double total[read_fields] = {};
  for (std::vector<HeadRead>& heads : report.heads) {
    heads.resize(static_cast<size_t>(read[1]));
    for (HeadRead& head : heads) {
      head = ratios(fields);
      for (int i = 0; i < read_fields; ++i) total[i] += fields[i];
      fields += read_fields;
    }
  }
  report.all = ratios(total);
  // Per query, since passes that are computed again for backward count twice.
  report.flops = total[read_queries] > 0 ? total[read_flops] / total[read_queries] *
                                               static_cast<double>(read[0] * read[1])
                                         : 0;
  std::fill_n(read.ptr<double>(), read.numel(), 0.0);
  counters.start_upload();
}

}  // namespace entrain

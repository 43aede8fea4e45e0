#include "dist/mpi.h"

#include <mpi.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <utility>
#include <vector>

namespace entrain {
namespace {

// MPI counts are int. Parts far below that limit also let one part travel while the next is summed.
constexpr int64_t part_elements = int64_t{1} << 22;
constexpr size_t part_bytes = size_t{1} << 26;

bool all_failed = false;  // and the MpiComm is gone: leave_mpi() ends MPI in its place

class MpiComm final : public Comm {
 public:
  MpiComm() {
    // A waiting rank leaves its core to whoever has work: ranks may share cores with each other and
    // with OpenMP threads. The user's own setting comes first.
    setenv("OMPI_MCA_mpi_yield_when_idle", "1", 0);
    int provided = 0;
    MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
    require(provided >= MPI_THREAD_FUNNELED,
            "this MPI cannot be used next to threads; use one built with MPI_THREAD_FUNNELED");
    MPI_Comm_rank(MPI_COMM_WORLD, &rank_);
    MPI_Comm_size(MPI_COMM_WORLD, &size_);
    MPI_Comm host;
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &host);
    MPI_Comm_rank(host, &local_rank_);
    MPI_Comm_free(&host);
  }

  ~MpiComm() override {
    if (std::uncaught_exceptions() == 0) {
      MPI_Finalize();
    } else {
      all_failed = all_fail_;
    }
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  int local_rank() const override { return local_rank_; }
  Device device() const override { return Device::cpu; }

  // The MPI standard (5.9) requires identical results on all ranks. That they repeat from run to
  // run rests on the order of summation being fixed: Open MPI sums in place along a binomial tree
  // to rank 0 and broadcasts, in an order that depends on the number of ranks alone.
  void start_sum(Tensor x) override {
    require(x.contiguous(), "only contiguous tensors can be summed over ranks");
    float* values = x.ptr<float>();
    for (int64_t at = 0; at < x.numel(); at += part_elements) {
      const auto count = static_cast<int>(std::min(part_elements, x.numel() - at));
      MPI_Iallreduce(MPI_IN_PLACE, values + at, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD,
                     &pending_.emplace_back());
    }
    // Earlier sums advance only inside calls of MPI.
    int done = 0;
    MPI_Testall(static_cast<int>(pending_.size()), pending_.data(), &done, MPI_STATUSES_IGNORE);
  }

  void wait() override {
    MPI_Waitall(static_cast<int>(pending_.size()), pending_.data(), MPI_STATUSES_IGNORE);
    pending_.clear();
  }

  // Not MPI_Allgather, whose counts end at 2^31 elements.
  void gather(Tensor rows) override {
    require(rows.contiguous() && rows[0] == size_, "every rank gathers one row");
    for (int r = 0; r < size_; ++r) {
      const Tensor row = rows.slice(0, r, 1);
      broadcast(row.data, row.bytes(), r);
    }
  }

  void sum(double* values, int count) override {
    MPI_Allreduce(MPI_IN_PLACE, values, count, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
  }

  void max(double* values, int count) override {
    MPI_Allreduce(MPI_IN_PLACE, values, count, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
  }

  void broadcast(void* data, size_t bytes, int root) override {
    for (size_t at = 0; at < bytes; at += part_bytes) {
      const auto count = static_cast<int>(std::min(part_bytes, bytes - at));
      MPI_Bcast(static_cast<std::byte*>(data) + at, count, MPI_BYTE, root, MPI_COMM_WORLD);
    }
  }

  void fail_together() override { all_fail_ = true; }
  bool recover() override { return std::exchange(all_fail_, false); }

 private:
  int rank_ = 0;
  int size_ = 1;
  int local_rank_ = 0;
  bool all_fail_ = false;
  std::vector<MPI_Request> pending_;
};

}  // namespace

std::unique_ptr<Comm> start_mpi() {
  return std::make_unique<MpiComm>();
}

void leave_mpi() {
  if (std::exchange(all_failed, false)) MPI_Finalize();
}

}  // namespace entrain

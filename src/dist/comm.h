#pragma once
// Ranks of one run and what they exchange: by MPI on CPUs, by NCCL on GPUs; a single process
// without MPI.
#include <memory>
#include <string>

#include "core/error.h"
#include "core/tensor.h"

namespace entrain {

class Comm {
 public:
  virtual ~Comm() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;
  /// This rank's number, from 0, among those of its host.
  virtual int local_rank() const = 0;
  /// Where the tensors are that it sums and gathers.
  virtual Device device() const = 0;

  /// Starts summing a contiguous f32 tensor over all ranks in place; wait() completes every sum
  /// started since the last one. The tensor must not be touched in between. Every rank starts the
  /// same sums in the same order; the result is bitwise the same on all ranks and from run to run.
  /// On GPUs, sums start after the work before them and what follows wait() comes after them, in a
  /// Graph too; the host waits for neither.
  virtual void start_sum(Tensor x) = 0;
  virtual void wait() = 0;

  /// Row r of a contiguous tensor is rank r's; afterwards all ranks have all rows. On GPUs in the
  /// order of their work.
  virtual void gather(Tensor rows) = 0;

  /// Blocking, for small host values. The maximum is that of numbers: a NaN may or may not show.
  virtual void sum(double* values, int count) = 0;
  virtual void max(double* values, int count) = 0;
  virtual void broadcast(void* data, size_t bytes, int root) = 0;

  /// Said by every rank when all are about to throw: they then wait for each other before the
  /// program ends, while after an error of one alone its launcher has to end the others.
  virtual void fail_together() = 0;
  /// Asked by every rank that caught an error and can go on without what failed: takes
  /// fail_together() back. False where it was not said: the rank failed alone and must throw on.
  virtual bool recover() = 0;
};

/// MPI when this process was started by mpirun or srun, otherwise a single process. Call once,
/// before threads start; the object finalizes MPI when it is destroyed. Throws Error under srun
/// without PMI, whose tasks would each take themselves for the only one.
std::unique_ptr<Comm> make_comm();

/// Makes every rank's text the root's.
void broadcast(Comm& comm, std::string& text, int root);

/// Throws Error on every rank, naming `what` and the first differing rank, unless all ranks pass
/// the same text (configurations, checkpoint names, vocabulary hashes).
void require_same(Comm& comm, const std::string& what, const std::string& text);

}  // namespace entrain

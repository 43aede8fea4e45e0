#include "dist/comm.h"

#include <algorithm>
#include <cstdlib>
#include <sstream>

#include "dist/mpi.h"

namespace entrain {
namespace {

class SingleProcess final : public Comm {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  int local_rank() const override { return 0; }
  Device device() const override { return Device::cpu; }
  void start_sum(Tensor) override {}
  void wait() override {}
  void gather(Tensor) override {}
  void sum(double*, int) override {}
  void max(double*, int) override {}
  void broadcast(void*, size_t, int) override {}
  void fail_together() override {}
  bool recover() override { return true; }
};

bool is_set(const char* variable) {
  return std::getenv(variable) != nullptr;
}

// Tasks of the Slurm step that this process is one of; 1 outside of srun.
int tasks_of_srun() {
  const char* tasks = is_set("SLURM_PROCID") ? std::getenv("SLURM_STEP_NUM_TASKS") : nullptr;
  return tasks ? std::max(1, std::atoi(tasks)) : 1;
}

// "'lr: 2' instead of 'lr: 1'": the first line in which two texts differ.
std::string first_difference(const std::string& text, const std::string& expected) {
  std::istringstream a(text), b(expected);
  std::string line, expected_line;
  do {
    if (!std::getline(a, line)) line.clear();
    if (!std::getline(b, expected_line)) expected_line.clear();
  } while (line == expected_line && (a || b));
  return fmt::format("'{}' instead of '{}'", line, expected_line);
}

}  // namespace

std::unique_ptr<Comm> make_comm() {
  // mpirun names its ranks itself. srun does where its plugin speaks PMI; without one its tasks
  // know nothing of each other, and each would train on its own into the same folder.
  if (is_set("OMPI_COMM_WORLD_SIZE")) return start_mpi();
  std::unique_ptr<Comm> comm;
  if (is_set("PMIX_RANK") || is_set("PMI_RANK")) {
    comm = start_mpi();
  } else {
    comm = std::make_unique<SingleProcess>();
  }
  require(comm->size() > 1 || tasks_of_srun() == 1,
          "srun started {} tasks but MPI sees only this one; use srun --mpi=pmix or mpirun",
          tasks_of_srun());
  return comm;
}

void broadcast(Comm& comm, std::string& text, int root) {
  size_t bytes = text.size();
  comm.broadcast(&bytes, sizeof bytes, root);
  text.resize(bytes);
  comm.broadcast(text.data(), bytes, root);
}

void require_same(Comm& comm, const std::string& what, const std::string& text) {
  std::string expected = text;
  broadcast(comm, expected, 0);
  // The first differing rank is the largest of the negative numbers.
  double differing = text == expected ? -comm.size() : -comm.rank();
  comm.max(&differing, 1);
  const int rank = static_cast<int>(-differing);
  if (rank == comm.size()) return;
  std::string difference = comm.rank() == rank ? first_difference(text, expected) : "";
  broadcast(comm, difference, rank);
  fail("rank {} has another {} than rank 0: {}; start all ranks with the same", rank, what,
       difference);
}

}  // namespace entrain

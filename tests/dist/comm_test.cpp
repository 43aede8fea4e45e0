#include "dist/comm.h"

#include <gtest/gtest.h>
#include <mpi.h>

#include <cstdlib>

namespace entrain {
namespace {

class LaunchedAlone : public testing::Test {
 protected:
  void SetUp() override {
    for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID",
                             "SLURM_STEP_NUM_TASKS"}) {
      unsetenv(name);
    }
  }
  void TearDown() override { SetUp(); }
};

TEST_F(LaunchedAlone, NeverStartsMpi) {
  const auto comm = make_comm();
  EXPECT_EQ(comm->rank(), 0);
  EXPECT_EQ(comm->size(), 1);
  double x = 3;
  comm->sum(&x, 1);
  comm->max(&x, 1);
  comm->broadcast(&x, sizeof x, 0);
  EXPECT_EQ(x, 3);
  EXPECT_NO_THROW(require_same(*comm, "configuration", "a"));
  int started = 1;
  MPI_Initialized(&started);
  EXPECT_FALSE(started);
}

TEST_F(LaunchedAlone, RefusesTasksThatCannotMeet) {
  setenv("SLURM_PROCID", "0", 1);
  setenv("SLURM_STEP_NUM_TASKS", "1", 1);
  EXPECT_EQ(make_comm()->size(), 1);
  setenv("SLURM_STEP_NUM_TASKS", "4", 1);
  EXPECT_THROW(make_comm(), Error);
}

}  // namespace
}  // namespace entrain

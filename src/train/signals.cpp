#include "train/signals.h"

#include <unistd.h>

#include <atomic>
#include <csignal>

namespace entrain {
namespace {

std::atomic<bool> stop = false;
static_assert(std::atomic<bool>::is_always_lock_free);  // safe in a signal handler

void handle(int signal) {
  if (stop.exchange(true)) _exit(128 + signal);
}

}  // namespace

void install_signal_handlers() {
  struct sigaction action {};
  action.sa_handler = handle;
  action.sa_flags = SA_RESTART;  // reads and writes under way go on
  sigemptyset(&action.sa_mask);
  for (const int signal : {SIGTERM, SIGINT, SIGUSR1}) sigaction(signal, &action, nullptr);
}

bool stop_requested() {
  return stop;
}

bool stop_requested(Comm& comm) {
  double any = stop ? 1 : 0;
  comm.max(&any, 1);
  return any > 0;
}

}  // namespace entrain

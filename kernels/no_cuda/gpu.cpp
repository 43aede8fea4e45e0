// A build without CUDA has no GPU: asked for one, it says so.
#include "core/gpu.h"

#include "core/error.h"

namespace entrain::gpu {
namespace {

[[noreturn]] void refuse() {
  fail("{}", why_unavailable());
}

}  // namespace

bool available() {
  return false;
}
std::string why_unavailable() {
  return "built without CUDA";
}
Info info() {
  refuse();
}
int count() {
  return 0;
}
void use(int) {
  refuse();
}
Uuid uuid(int) {
  refuse();
}
void* allocate(size_t) {
  refuse();
}
void release(void*) noexcept {}
void* allocate_pinned(size_t) {
  refuse();
}
void release_pinned(void*) noexcept {}
void to_device(void*, const void*, size_t) {
  refuse();
}
void to_host(void*, const void*, size_t) {
  refuse();
}
void copy(void*, const void*, size_t) {
  refuse();
}
void zero(void*, size_t) {
  refuse();
}
void round_to_bf16(void*, const void*, size_t) {
  refuse();
}
void synchronize() {
  refuse();
}

Event::Event() : event_(nullptr, nullptr) {
  refuse();
}
void Event::record() {
  refuse();
}
void Event::wait() const {
  refuse();
}
double Event::seconds_since(const Event&) const {
  refuse();
}

void Graph::capture(const std::function<void()>&) {
  refuse();
}
void Graph::launch() const {
  refuse();
}

}  // namespace entrain::gpu

#include "core/file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <thread>

#include "core/error.h"

namespace entrain {
namespace {

[[noreturn]] void fail_writing(const std::string& path) {
  fail("cannot write {}: {}", path, std::strerror(errno));
}

}  // namespace

std::string read_file(const std::string& path) {
  require(!std::filesystem::is_directory(path), "cannot read {}: it is a folder", path);
  std::ifstream file(path, std::ios::binary);
  require(file.good(), "cannot read {}: {}", path, std::strerror(errno));
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  require(!file.bad(), "cannot read {}: {}", path, std::strerror(errno));
  return text;
}

void replace_file(const std::string& path, const std::string& text) {
  const std::string beside = path + ".partial";
  const int file = ::open(beside.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (file < 0) fail_writing(beside);
  for (size_t done = 0; done < text.size();) {
    const ssize_t count = ::write(file, text.data() + done, text.size() - done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) {
      const int reason = errno;
      ::close(file);
      ::unlink(beside.c_str());
      errno = reason;
      fail_writing(path);
    }
    done += static_cast<size_t>(count);
  }
  const bool flushed = ::fsync(file) == 0;
  if (::close(file) != 0 || !flushed) fail_writing(path);
  if (::rename(beside.c_str(), path.c_str()) != 0) fail_writing(path);
  sync_folder(path);
}

FolderLock::FolderLock(const std::string& folder, const std::string& work) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  require(!error, "cannot create folder {}: {}", folder, error.message());
  descriptor_ = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  require(descriptor_ >= 0, "cannot open folder {}: {}", folder, std::strerror(errno));
  for (int attempt = 0; attempt < 50; ++attempt) {
    // A file system without locks grants them all.
    if (::flock(descriptor_, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  ::close(descriptor_);
  fail("another process {} {}; wait for it, or choose another folder", work, folder);
}

FolderLock::~FolderLock() {
  ::close(descriptor_);
}

void require_replaceable(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code unknown;  // then writing fails and says why
  const fs::file_status status = fs::symlink_status(path, unknown);
  require(!fs::is_directory(status), "{}: is a folder; name a file to write", path);
  require(!fs::exists(status) || fs::is_regular_file(status),
          "{}: exists and is no ordinary file; choose another name to write, or remove it", path);
}

void sync_folder(const std::string& path) {
  const std::string folder = std::filesystem::absolute(path).parent_path().string();
  const int descriptor = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) return;
  const bool synced = ::fsync(descriptor) == 0 || errno == EINVAL;  // EINVAL: it cannot
  const int error = errno;
  ::close(descriptor);
  require(synced, "{}: cannot be flushed to the disk: {}", folder, std::strerror(error));
}

}  // namespace entrain

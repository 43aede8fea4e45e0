#pragma once
// Small text files, whole.
#include <string>

namespace entrain {

/// Throws Error naming the file and the reason: missing, a folder, not permitted.
std::string read_file(const std::string& path);

/// Replaces a file so that a reader, or a crash, sees the old text or the new one and nothing
/// between: written beside it, flushed to the disk, renamed. Throws Error, also when the disk is
/// full.
void replace_file(const std::string& path, const std::string& text);

/// A folder that one process at a time works in. The lock leaves no trace and ends with the object,
/// or with the process however that ends.
class FolderLock {
 public:
  /// Makes the folder where there is none. Throws Error when another process holds it and does not
  /// end within seconds, as one that was killed would; `work` says what that does.
  FolderLock(const std::string& folder, const std::string& work);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  int descriptor_;
};

/// Before work whose result is renamed to `path`: throws Error where that would replace a folder, a
/// link, a device or a pipe.
void require_replaceable(const std::string& path);

/// Makes a rename to `path` survive a power cut, where the file system can. Throws Error when the
/// disk fails.
void sync_folder(const std::string& path);

}  // namespace entrain

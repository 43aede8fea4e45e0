#include "core/file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <optional>

#include "core/error.h"
#include "tests/expect_error.h"
#include "tests/temp_dir.h"

namespace entrain {
namespace {

TEST(File, ReplacesWholeAndLeavesNothingBeside) {
  const std::string dir = testing::TempDir() + "file_test";
  std::filesystem::remove_all(dir);
  std::filesystem::create_directories(dir);
  replace_file(dir + "/a", "first, the longer one");
  replace_file(dir + "/a", std::string("two\0\n", 5));
  EXPECT_EQ(read_file(dir + "/a"), std::string("two\0\n", 5));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(dir), {}), 1);
}

TEST(File, RefusesToReplaceWhatIsNoOrdinaryFile) {
  const TempDir dir;
  write_file(dir / "file", "");
  std::filesystem::create_symlink(dir / "file", dir / "link");
  std::filesystem::create_symlink(dir / "absent", dir / "dangling");
  ASSERT_EQ(mkfifo((dir / "pipe").c_str(), 0600), 0);
  EXPECT_NO_THROW(require_replaceable(dir / "file"));
  EXPECT_NO_THROW(require_replaceable(dir / "absent"));
  EXPECT_NO_THROW(require_replaceable(dir / "no/such/folder"));
  EXPECT_ERROR(require_replaceable(dir / ""), "is a folder; name a file to write");
  for (const char* name : {"link", "dangling", "pipe"}) {
    EXPECT_ERROR(require_replaceable(dir / name),
                 (dir / name) + ": exists and is no ordinary file; choose another name to write");
  }
}

TEST(File, NamesWhatCannotBeReadOrWritten) {
  const auto message = [](auto&& act) -> std::string {
    try {
      act();
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  EXPECT_EQ(message([] { read_file("/no/such/file"); }),
            "cannot read /no/such/file: No such file or directory");
  EXPECT_EQ(message([] { read_file("/usr"); }), "cannot read /usr: it is a folder");
  EXPECT_EQ(message([] { replace_file("/no/such/file", ""); }),
            "cannot write /no/such/file.partial: No such file or directory");
}

TEST(File, AFolderIsLockedWhileTheLockLives) {
  const TempDir dir;
  const std::string folder = dir / "made/on the way";
  std::optional<FolderLock> lock;
  lock.emplace(folder, "trains in");
  EXPECT_ERROR(FolderLock(folder, "trains in"), "another process trains in " + folder);
  lock.reset();
  FolderLock(folder, "trains in");
  EXPECT_TRUE(std::filesystem::is_empty(folder));
}

}  // namespace
}  // namespace entrain

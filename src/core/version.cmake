# Run at every build (cmake -D SOURCE=... -D OUTPUT=... -D VERSION=... -P), so that the commit is the
# one being built; the file changes, and is compiled again, only when the version does.
if(EXISTS ${SOURCE}/.git)
  execute_process(
    COMMAND git describe --always --dirty
    WORKING_DIRECTORY ${SOURCE}
    OUTPUT_VARIABLE COMMIT
    OUTPUT_STRIP_TRAILING_WHITESPACE
    RESULT_VARIABLE FAILED
    ERROR_QUIET)
  if(NOT FAILED AND COMMIT)
    set(VERSION "${VERSION} (${COMMIT})")
  endif()
endif()
configure_file(${SOURCE}/src/core/version.cpp.in ${OUTPUT} @ONLY)

#pragma once
// Which code this is: written into checkpoints and results.

namespace entrain {

/// "0.1 (f4d9986)", "-dirty" after the commit where files were changed since; "0.1" outside git.
const char* code_version();

}  // namespace entrain

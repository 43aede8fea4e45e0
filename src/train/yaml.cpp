#include "train/yaml.h"

#include <algorithm>
#include <vector>

namespace entrain {

std::string excerpt(const std::string& text) {
  constexpr size_t longest = 40;
  const size_t end = std::min(text.find('\n'), longest);
  return end < text.size() ? text.substr(0, end) + "..." : text;
}

const char* kind_of(const YAML::Node& node) {
  return node.IsMap() ? "a map" : node.IsSequence() ? "a list" : "a value";
}

std::string line_of(const std::string& file, const YAML::Node& node) {
  return fmt::format("{}:{}", file, node.Mark().line + 1);
}

std::string key_name(const std::string& file, const YAML::Node& key) {
  if (!key.IsScalar()) {
    refuse("{}: a key must be a word, not {}", line_of(file, key), kind_of(key));
  }
  return key.Scalar();
}

YAML::Node load_document(const std::string& yaml, const std::string& file, const char* what,
                         const char* sections) {
  std::vector<YAML::Node> documents;
  try {
    documents = YAML::LoadAll(yaml);
  } catch (const YAML::Exception& error) {
    refuse("{}:{}: not valid YAML: {}", file, error.mark.line + 1, error.msg);
  }
  if (documents.empty() || documents[0].IsNull()) {
    refuse("{} is empty; it needs the sections {}", file, sections);
  }
  if (documents.size() > 1) {
    refuse("{}: a second YAML document starts; give each {} its own file",
           line_of(file, documents[1]), what);
  }
  if (!documents[0].IsMap()) {
    refuse("{}: must be a map of the sections {}, not {}", line_of(file, documents[0]), sections,
           kind_of(documents[0]));
  }
  return documents[0];
}

}  // namespace entrain

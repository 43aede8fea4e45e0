# shellcheck shell=bash disable=SC2034
# The Python manual: its reStructuredText sources, as the distribution ships them beside the HTML.
description="The Python documentation, reStructuredText sources"
licence="PSF-2.0"  # code examples also under 0BSD
packages=(python3.11-doc python3.12-doc python3.13-doc)  # the first one the distribution has
root='usr/share/doc/python3.??/html/_sources'
glob='*.rst.txt'
declare -A known_sha256=(
  ["python3.11-doc 3.11.2-6+deb12u8"]=50eb63e7f636c4281e9ce1b8f10386f1def42159eddce34fc1f41c46261df71b
  ["python3.11-doc 3.11.2-6+deb12u9"]=5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be
  ["python3.12-doc 3.12.3-1"]=17028cef12f0527f170394ad25f9813457e63ee933642dc8d24bfd3ad4c52196
  ["python3.12-doc 3.12.3-1ubuntu0.17"]=c777227d9ac5d3a852da81f5f9e8f6cb4239706225970f1a1fa60ccf52e5358b
)

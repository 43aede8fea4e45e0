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
)

# shellcheck shell=bash disable=SC2034
# The Go distribution: standard library, compiler and tools. A package is a folder, so that sorted by
# path its files stand next to each other and a long context holds what a file refers to.
description="Source of the Go standard library, compiler and tools"
licence="BSD-3-Clause"
packages=(golang-1.19-src golang-1.21-src golang-1.22-src)  # the first one the distribution has
root='usr/share/go-1.??/src'
glob='*.go'
declare -A known_sha256=(
  ["golang-1.19-src 1.19.8-2"]=2dfa82fe4f08f4e0193c532e561af4c91871f5235608f04f2bb8d57bb288df5a
  ["golang-1.21-src 1.21.9-1"]=fc1e7b5eb3bf99d7f9e7ce42239b528effc0041510abc0f11b561204bd0406d3
  ["golang-1.21-src 1.21.9-1ubuntu0.1"]=2b4cb1eaee84347ecc64aee7a36af8686b40bec5656b9123dfb9052fc935c680
)

#!/usr/bin/env bash
# Reads settings from a configuration file and overrides, without Python, for scripts that run where sbatch runs.
#
# The caller first sources common.sh, and sets `conf`, the path of the file, and the array `overrides`.
# shellcheck disable=SC2154

# setting SECTION.KEY...: the last override of that key, otherwise its value in the file.
setting() {
  local key=$1 word value
  value=$(from_file "${key//./ }")
  for word in "${overrides[@]}"; do
    [[ $word != "$key="* ]] || value=${word#*=}
  done
  printf '%s' "$value"
}

# path_setting SECTION.KEY: the value of that key as a path that has the same meaning in all jobs.
path_setting() {
  local path single="^'([^']*)'\$" double='^"([^"\]*)"$'
  path=$(setting "$1")
  if [[ $path =~ $single || $path =~ $double ]]; then path=${BASH_REMATCH[1]}; fi
  # Expanded in the same way as by `popsd train`, and not by the shell, which would also run a command in it.
  # shellcheck disable=SC2016,SC2088
  case $path in
  null | '???') path= ;;
  '~' | '~/'*) path=$HOME${path#'~'} ;;
  '$HOME' | '$HOME/'*) path=$HOME${path#'$HOME'} ;;
  '${HOME}' | '${HOME}/'*) path=$HOME${path#'${HOME}'} ;;
  esac
  [[ $path != *'$'* && $path != [\"\'~]* ]] ||
    die "$USER_ERROR" "pipeline: got $1=$path; need a literal path, without variables, ~name and nested quotes, since four jobs must read it alike; set $1=PATH"
  printf '%s' "$path"
}

# from_file "SECTION KEY": the value of a plain line in the YAML file; indentation determines the section.
from_file() {
  awk -v path="$1" '
    BEGIN { depth = split(path, wanted, " "); at = 1 }
    /^[ ]*(#|$)/ { next }
    {
      indent = match($0, /[^ ]/) - 1
      while (at > 1 && indent <= indents[at - 1]) at--
      line = substr($0, indent + 1)
      if ((at == 1 ? indent == 0 : indent > indents[at - 1]) && index(line, wanted[at] ":") == 1) {
        value = substr(line, length(wanted[at]) + 2)
        if (at == depth) {
          sub(/\r$/, "", value); gsub(/^ +| +$/, "", value)
          quote = substr(value, 1, 1)
          if (quote == "\"" || quote == "\047") {
            length_in_quotes = index(substr(value, 2), quote) + 1
            if (substr(value, length_in_quotes + 1) ~ /^( +#.*)?$/) value = substr(value, 1, length_in_quotes)
          } else sub(/(^| +)#.*/, "", value)
          # A list or a mapping may also be below its key, with a line for each entry.
          while (value == "" && (getline line) > 0) if (line !~ /^[ ]*(#|$)/) {
            if (line ~ /^[ ]*-/) value = "list"
            else if (match(line, /[^ ]/) - 1 > indent && line ~ /^[ ]*[^ ]+:( |$)/) value = "mapping"
            break
          }
          print value
          exit
        }
        indents[at++] = indent
      }
    }' "$conf"
}

# name_setting: the name of the run, by default that of the file.
name_setting() {
  local name file=${conf##*/}
  name=$(path_setting name) || exit
  printf '%s' "${name:-${file%.*}}"
}

# output_setting: the output of the run, by default runs/NAME.
output_setting() {
  local output name
  output=$(path_setting output) || exit
  name=$(name_setting) || exit
  printf '%s' "${output:-runs/$name}"
}

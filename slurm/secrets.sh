# shellcheck shell=bash
# Passes the secrets in the file POPSD_SECRETS to the processes of the job's steps, and never logs them. Sourced by
# common.sh.
#
# The values are in shell variables that are not exported, so that no command of the job script has them in its
# environment. Functions that handle a value first disable tracing (`set -x`), which would show it.

# read_secrets FILE: fills SECRET_NAMES and SECRET_VALUES from lines NAME=VALUE. The file is parsed, never executed.
read_secrets() {
  local - file=$1 line number=0
  set +x
  SECRET_NAMES=() SECRET_VALUES=()
  [[ -f $file && -r $file && -O $file && $(stat --dereference --format=%a "$file") == *00 ]] ||
    die "$USER_ERROR" "POPSD_SECRETS: got $file, which is missing, owned by another user, or readable by others; need your own file, readable only by you; chmod 600 it"
  while IFS= read -r line || [[ $line ]]; do
    ((++number))
    read_secret "${line%$'\r'}" ||
      die "$USER_ERROR" "POPSD_SECRETS: got line $number of $file, which is not NAME=VALUE; need a plain value, or single quotes around one with spaces or special characters (the file is read, not run); correct that line"
  done <"$file"
}

# read_secret LINE: adds its variable; fails if it is neither NAME=VALUE nor blank nor a comment.
read_secret() {
  local name value blank='^[[:space:]]*(#|$)' single="^'([^']*)'[[:space:]]*(#.*)?\$"
  local line='^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)$'
  local double='^"([^"$`\]*)"[[:space:]]*(#.*)?$' bare='^([^[:space:]"'\''$`\]*)([[:space:]]+#.*|[[:space:]]*)$'
  [[ ! $1 =~ $blank ]] || return 0
  [[ $1 =~ $line ]] || return 1
  name=${BASH_REMATCH[2]} value=${BASH_REMATCH[3]}
  [[ $value =~ $single || $value =~ $double || $value =~ $bare ]] || return 1
  value=${BASH_REMATCH[1]}
  # Names that are read-only in the shell, such as UID.
  (unset -v "$name") 2>/dev/null || return 1
  SECRET_NAMES+=("$name")
  SECRET_VALUES+=("$value")
}

# is_secret NAME VALUE: whether the variable is a secret, or contains the value of one.
is_secret() {
  local index value
  for index in "${!SECRET_NAMES[@]}"; do
    value=${SECRET_VALUES[index]}
    [[ $1 != "${SECRET_NAMES[index]}" ]] || return 0
    [[ -z $value || $2 != "$value" ]] || return 0
    # As part of another value, except for very short secrets, which occur everywhere.
    ((${#value} < 6)) || [[ $2 != *"$value"* ]] || return 0
  done
  return 1
}

# srun_with_secrets ARGUMENT...: runs srun with the secrets in its environment. Replaces the shell that calls it, so call
# it in a subshell.
srun_with_secrets() {
  local index
  set +x
  for index in "${!SECRET_NAMES[@]}"; do
    export "${SECRET_NAMES[index]}=${SECRET_VALUES[index]}"
  done
  exec srun "$@"
}

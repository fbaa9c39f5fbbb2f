# What .ci/run and .ci/thorough share: environments made here, the README's own commands, and the time of each stage.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$(mktemp -d)
export JAX_PLATFORMS=cpu PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1 UV_QUIET=1 PYTHONUNBUFFERED=1
unset XLA_FLAGS PYTEST_ADDOPTS

count_cpu() { # sets `cpu`: the seconds of this shell and of all that it has waited for (a subshell would see its own)
  local file="$root/times-$BASHPID"
  times >"$file"
  cpu=$(awk '{ for (i = 1; i <= NF; i++) { split($i, t, "m"); s += 60 * t[1] + t[2] } } END { printf "%d", s }' "$file")
}

# The stages that the command line names, or else all of them.
choose_stages() { stages=" ${*:2} "; if [ $# -eq 1 ]; then stages=" $1 "; fi; }
wanted() { [[ "$stages" == *" $1 "* ]]; }

report=() stage_name="" stage_began=0 stage_cpu=0 cpu=0 others=() beside_job=""
report_line() { printf '%6d s %7d CPU s   %s' "$@"; }
end_stage() {
  if [ -z "$stage_name" ]; then return; fi
  count_cpu
  report+=("$(report_line $((SECONDS - stage_began)) $((cpu - stage_cpu)) "$stage_name")")
  stage_name=""
}
stage() {
  end_stage
  count_cpu
  stage_name=$1 stage_began=$SECONDS stage_cpu=$cpu
  printf '\n=== %s (at %s s)\n' "$1" "$SECONDS"
}

# `beside FUNCTION NAME`: a stage of one process, to run beside the tests, which leave a core now and then. `start_beside`
# starts these stages, one after another. `end_beside` waits for them, prints what they printed, and fails where one did.
beside() { others+=("$1 $2"); }
start_beside() {
  if [ ${#others[@]} -eq 0 ]; then return; fi
  printf '\n=== beside what follows: %s\n' "$(printf '%s; ' "${others[@]#* }")"
  (
    set +e # one that fails does not stop the next; `||` in its place would let errors inside it pass
    for other in "${others[@]}"; do
      (
        set -e
        count_cpu
        began=$SECONDS before=$cpu
        "${other%% *}"
        count_cpu
        report_line $((SECONDS - began)) $((cpu - before)) "beside it: ${other#* }" >"$root/${other%% *}.time"
      ) >"$root/${other%% *}.log" 2>&1
    done
  ) &
  beside_job=$!
}
end_beside() {
  if [ -z "$beside_job" ]; then return; fi
  local other file failed=0
  wait "$beside_job" || true
  beside_job=""
  for other in "${others[@]}"; do
    file="$root/${other%% *}"
    printf '\n=== %s\n' "${other#* }"
    cat "$file.log"
    if [ -f "$file.time" ]; then
      report+=("$(cat "$file.time")")
    else
      report+=("                        beside it: ${other#* }: FAILED") failed=1
    fi
  done
  return $failed
}
finish() {
  local code=$?
  if [ "$code" -ne 0 ] && [ -n "$stage_name" ]; then stage_name="$stage_name: FAILED"; fi
  end_stage
  if [ "$code" -gt 128 ] && [ -n "$beside_job" ]; then kill "$beside_job" && beside_job=""; fi # interrupted
  end_beside || code=1
  printf '\n=== how long each stage took\n'
  printf '%s\n' "${report[@]}"
  count_cpu
  printf '%6d s %7d CPU s   in all\n' "$SECONDS" "$cpu"
  rm -rf "$root"
  exit "$code"
}
trap finish EXIT

# uv installs in seconds what takes pip a minute. Where it cannot be had, or cannot install something, pip does it.
uv=""
if python3 -m venv "$root/tools" && "$root/tools/bin/pip" install uv; then uv="$root/tools/bin/uv"; fi
if [ -n "${PIP_FIND_LINKS:-}" ]; then export UV_FIND_LINKS=$PIP_FIND_LINKS; fi
pip() { { [ -n "$uv" ] && "$uv" pip "$@" -q; } || python -m pip "$@"; }

environment() { "$1" -m venv "$root/$2" && . "$root/$2/bin/activate"; }

# The command in README.md after a heading, so that what is tested is what users type.
readme_command() { sed -n "/^$1/,/^\`\`\`\$/p" README.md | grep '^pip '; }

# The newest Python here, which has the newest JAX; `python3` is the oldest that lojax supports.
newest_python() {
  if [ -n "${LOJAX_NEWEST_PYTHON:-}" ]; then echo "$LOJAX_NEWEST_PYTHON"; return; fi
  ls "$HOME"/.pyenv/versions/*/bin/python3 /usr/bin/python3.* 2>/dev/null | grep -E '3\.1[2-9]' | sort -V | tail -n 1 || true
}

# Programs that are compiled more than once, by either process of a test run, are compiled once. The cache starts empty.
compile_cache() {
  export JAX_COMPILATION_CACHE_DIR="$root/xla-$1"
  export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
}
no_compile_cache() { unset JAX_COMPILATION_CACHE_DIR; }

# A seed that no run has had before.
new_seed() { printf '%s %s' "$(git rev-parse HEAD 2>/dev/null || echo none)" "$(date +%s%N)" | cksum | cut -d ' ' -f 1; }

#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs a command with its output in build/install.log, and says what it does, and from five seconds on how long for.
#
#   scripts/logged.sh WHAT COMMAND [ARGUMENT ...]
#
# Ends with the command's status; if that is not 0, the log's last lines are shown.
what=$1 log=$(cd "$(dirname "$0")/.." && pwd)/build/install.log
shift
mkdir -p "$(dirname "$log")"
printf '\n== %s: %s\n' "$what" "$*" >> "$log"
"$@" >> "$log" 2>&1 &
command=$!
trap 'kill $command' INT TERM
begin=$SECONDS wait=5
while kill -0 $command 2> /dev/null; do
  if ((SECONDS - begin >= wait)); then
    echo "   $what: $((SECONDS - begin)) s, $(tr '\r' '\n' < "$log" | grep . | tail -n 1 | cut -c 1-90)"
    wait=$((wait * 2))
  fi
  sleep 0.2
done
wait $command
status=$?
if [ $status -ne 0 ]; then
  echo "$what failed with status $status; the end of $log:" >&2
  tail -n 40 "$log" >&2
fi
exit $status

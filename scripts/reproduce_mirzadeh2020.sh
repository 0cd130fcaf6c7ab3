#!/usr/bin/env bash
# Mirzadeh et al. 2020, teacher assistants. Usage: scripts/reproduce.sh
source "$(dirname "$0")/reproduce.sh"

metrics_of() { echo last,direct/test/top1,gain/test/top1; }

run mirzadeh2020_assistants
finish

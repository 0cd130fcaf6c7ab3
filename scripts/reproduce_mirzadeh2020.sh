#!/usr/bin/env bash
# Mirzadeh et al. 2020, teacher assistants. Usage: scripts/reproduce.sh
source "$(dirname "$0")/reproduce.sh"

run mirzadeh2020_assistants
finish

#!/usr/bin/env bash
# Xie et al. 2020, noisy student. Usage: scripts/reproduce.sh
source "$(dirname "$0")/reproduce.sh"

run xie2020_noisy_student "$own_teachers"
finish

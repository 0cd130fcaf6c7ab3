#!/usr/bin/env bash
# Beyer et al. 2022, patient and consistent teaching. Usage: scripts/reproduce.sh
source "$(dirname "$0")/reproduce.sh"

if [ "$size" = small ]; then epochs=30,240; else epochs=240,1200; fi
run beyer2022_patient schedule.epochs=$epochs
finish

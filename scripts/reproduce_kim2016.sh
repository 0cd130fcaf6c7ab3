#!/usr/bin/env bash
# Kim and Rush 2016: word-level and sequence-level distillation, of small language models. Usage: scripts/reproduce.sh
source "$(dirname "$0")/reproduce.sh"

metrics_of() {
  case $1 in
    *_sequence_kd) echo last,test/nll,own_text/nll ;;
    *) echo last,best,test/nll ;;
  esac
}

own run kim2016_word_kd "$own_teachers" loss=ban_l,ce
own run kim2016_sequence_kd "$own_teachers" procedure.texts=teacher,data
finish

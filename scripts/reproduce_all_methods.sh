#!/usr/bin/env bash
# Every loss of configs/loss against KL with the same teacher, student, images and seeds. Small: 300 embedded digits;
# full: 4,000 CIFAR-10 images (experiment=tian2020_cifar10). Usage: scripts/reproduce.sh, and for other files, for instance
#   scripts/reproduce_all_methods.sh full dataset=imagefolder dataset.root=cifar10-jpeg dataset.size=32 dataset.subset=4000
# LOSSES=kl,dkd names fewer. Losses that share a batch train side by side. Ends in verdicts against KL.
source "$(dirname "$0")/reproduce.sh"

weak=jitter # what the teacher of all others sees
[ "$size" = small ] || { suffix=_cifar10; weak=crop_flip; }
# What needs another teacher, student or augmentation runs by itself below; tfkd_self and pskd teach themselves; deit and
# vitkd are for vision transformers.
apart=' aekd camkd ce crld deit hsakd pskd sskd tfkd_self vitkd '
named=${LOSSES:-$(cd "$(dirname "$0")/../configs/loss" && printf '%s\n' *.yaml | sed 's/\.yaml$//' | paste -sd, -)}
losses=$(tr , '\n' <<<"$named" | while read -r name; do [[ $apart == *" $name "* ]] || echo "$name"; done | paste -sd, -)
one() { [[ ,$named, == *,$1,* ]] || return 0; shift; run tian2020 "$@"; }

run tian2020 "loss=$losses" hydra/launcher=cohort
one ce loss=ce teacher=none
one pskd loss=pskd loss.as_published=true teacher=none
one crld loss=crld dataset/augment=weak_strong "+dataset/augment@dataset.teacher_augment=$weak"
for name in sskd hsakd; do # one epoch of what they train first for each of the student's; published: 60
  one $name loss=$name loss.epochs='${schedule.epochs}' dataset/augment=rotations "+dataset/augment@dataset.teacher_augment=$weak"
done
one mlkd loss=mlkd loss.views=2 dataset/augment=weak_strong "+dataset/augment@dataset.teacher_augment=$weak"
one kl loss=kl optimizer=dot optimizer@teacher.optimizer=sgd
one deepkd loss=deepkd optimizer=deepkd optimizer@teacher.optimizer=sgd
one dhkd loss=dhkd optimizer=aligned_sgd optimizer@teacher.optimizer=sgd
one aekd loss=kl,aekd,camkd teacher=ensemble 'teacher.members=[0,1,2]'

echo
kdbench compare "$outputs/tian2020" --against teacher=resnet20,loss=kl,optimizer=sgd --metric last || failed=1
exit $failed

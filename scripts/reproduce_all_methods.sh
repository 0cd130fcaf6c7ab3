#!/usr/bin/env bash
# Every loss of configs/loss for labelled images against KL with the same teacher, student, images and seeds. Small: 300 embedded digits;
# full: 4,000 CIFAR-10 images (experiment=tian2020_cifar10). Usage: scripts/reproduce.sh, and for other files, for instance
#   scripts/reproduce_all_methods.sh full dataset=imagefolder dataset.root=cifar10-jpeg dataset.size=32 dataset.subset=4000
# LOSSES=ab,dkd names fewer, and KL always. Losses that share a batch train side by side. Ends in verdicts against KL.
source "$(dirname "$0")/reproduce.sh"

if smoking; then # the networks are what is compared; large weights of losses need the rise of the rate
  words=("${words[@]/%debug=smoke/debug=short}" schedule.warmup=1)
fi
weak=jitter # what the teacher of all others sees
patch=2     # pixels a side of a transformer's patches
[ "$size" = small ] || { suffix=_cifar10; weak=crop_flip; patch=4; }
# What needs another teacher, student, rate or augmentation runs by itself below; tfkd_self and pskd teach themselves. cosine,
# feature_mse and relational learn embeddings without labels (docs/recipes.md): no accuracy to compare.
apart=' aekd camkd ce cosine crld deit feature_mse hsakd pskd relational semckd sskd tfkd_self vitkd '
named=${LOSSES:-$(cd "$(dirname "$0")/../configs/loss" && printf '%s\n' *.yaml | sed 's/\.yaml$//' | paste -sd, -)}
losses=$(tr , '\n' <<<"$named" | while read -r name; do [[ $apart == *" $name "* ]] || echo "$name"; done | paste -sd, -)
[[ ,$losses, == *,kl,* ]] || losses=kl${losses:+,$losses}
one() { [[ ,$named, == *,$1,* ]] || return 0; shift; run tian2020 "$@"; }

run tian2020 "loss=$losses" hydra/launcher=cohort
one ce loss=ce teacher=none
one tfkd_self loss=kl,tfkd_self teacher=resnet8
one pskd loss=pskd loss.as_published=true teacher=none
one semckd loss=semckd schedule.lr=0.01 # with its published weight, 400, the loss is not finite at 0.1
one crld loss=crld dataset/augment=weak_strong "+dataset/augment@dataset.teacher_augment=$weak"
for name in sskd hsakd; do # one epoch of what they train first for each of the student's; published: 60
  one $name loss=$name loss.epochs='${schedule.epochs}' dataset/augment=rotations "+dataset/augment@dataset.teacher_augment=$weak"
done
one mlkd loss=mlkd loss.views=2 dataset/augment=weak_strong "+dataset/augment@dataset.teacher_augment=$weak"
one kl loss=kl optimizer=dot optimizer@teacher.optimizer=sgd
one deepkd loss=deepkd optimizer=deepkd optimizer@teacher.optimizer=sgd
one dhkd loss=dhkd optimizer=aligned_sgd optimizer@teacher.optimizer=sgd
for name in aekd camkd; do # both beside KL with the mean of the same teachers, which is run once
  one $name loss=kl,$name teacher=ensemble 'teacher.members=[0,1,2]'
done
# Two are for vision transformers, beside KL with the same: four blocks, 48 dimensions, and 96 of a teacher that is one.
vit() { echo "$1=deit_tiny_cifar $1.options.patch_size=$patch +$1.options.depth=4 +$1.options.embed_dim=$2"; }
adamw='optimizer=adamw optimizer.lr=0.001'
one deit loss=kl,deit $(vit student 48) +student.options.distilled=true $adamw optimizer@teacher.optimizer=sgd
one vitkd loss=kl,vitkd $(vit student 48) $(vit teacher 96) $adamw

echo
kdbench compare "$outputs/tian2020" --against teacher=resnet20,loss=kl,optimizer=sgd --metric last || failed=1
exit $failed

#!/bin/sh
# freehold-pico from an empty folder to the model that Freehold ships: text, tokenizer, data, training, export.
#
#   examples/pico/pico.sh FOLDER [cuda|cpu]
#
# Everything is seeded. A run that is stopped, by Ctrl-C or by a crash, goes on when the same command is given again:
# what is finished is left alone, and a training goes on from its last save. `freehold` has to be on the PATH.
set -eu
recipe=$(cd "$(dirname "$0")" && pwd)
folder=$1 device=${2:-cpu}
num_texts=40000 num_chats=40000 num_held_out=100
case $device in
cuda) # the model that is shipped: 57 million tokens, ten minutes of a large GPU
    pretraining_steps=7000 fine_tuning_steps=1000
    set -- --set device='"cuda"' --set dtype='"bfloat16"' --set data.budget_tokens=8192 --set data.tokens_per_step=8192
    ;;
cpu) # a lesser one of 9 million tokens, for an hour of two cores
    pretraining_steps=4400 fine_tuning_steps=400
    set --
    ;;
*)
    echo "the device is cuda or cpu, not $device" >&2
    exit 2
    ;;
esac
mkdir -p "$folder/data"
cd "$folder"
export PYTHONDONTWRITEBYTECODE=1

# 1. Text. Stories and conversations are put together from our own sentences, by number (grammar.py, words/).
[ -d rows ] || python "$recipe/rows.py" rows "$num_texts" "$num_chats" "$num_held_out"

# 2. The tokenizer: byte-level BPE of the words that occur, with the special tokens and the chat format of Nemotron 3.
[ -d tokenizer ] || python "$recipe/tokenizer.py" rows/texts.jsonl rows/chats.jsonl tokenizer

# 3. Rows become tokens, once. Of texts everything is trained on, of conversations what the assistant says.
for name in held-out-texts held-out-chats texts chats; do
    [ -f "data/$name/data.json" ] || freehold data build "rows/$name.jsonl" --model tokenizer --out "data/$name"
done

# 4. Pre-training on all of it: first weights as Nemotron's are drawn, AdamW, warm-up, stable time, decay.
[ -f config.json ] || cp "$recipe/config.json" config.json
[ -d pretrained/model ] ||
    freehold train pretrain "$recipe/pretrain.toml" --set schedule.total="$pretraining_steps" "$@"

# 5. Fine-tuning on the conversations alone.
[ -d tuned/model ] || freehold train sft "$recipe/sft.toml" --set schedule.total="$fine_tuning_steps" "$@"

# 6. What is shipped: bfloat16, with the tokenizer beside it. The laws are checked on it as on any model.
[ -d freehold-pico ] || freehold convert tuned/model freehold-pico --dtype bf16
freehold check freehold-pico

# 7. How well it foretells stories that it has not seen, and what it says.
python "$recipe/report.py" .

# Sourced by tools/demo with the function `heed` and the folder `$out`: segment organs in volumes that it makes itself.
heed sample msga "$out/data"
heed check msga "$out/data"
heed train msga --data "$out/data" --out "$out/run" --trainer.max-epochs 60 --trainer.validate-every 5 \
    --training.augmentation.flip-probability 0.5
heed evaluate "$out/run" --data "$out/data"
heed predict "$out/run" "$out/data/imagesTs" --out "$out/predictions"
heed explain "$out/run" "$out/data/imagesTs" --out "$out/explanations"
echo
echo "Pictures to look at:"
find "$out/run" "$out/explanations" -name '*.png' -not -path '*/data/*' | sort | head -n 12

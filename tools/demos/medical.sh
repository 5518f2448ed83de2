# Sourced by tools/demo with the function `heed` and the folder `$out`: segment organs in volumes,
# classify chests, look for patches of slides, write reports, join X-rays, ECGs and reports, on data
# that it makes itself.
heed sample msga "$out/data"
heed check msga "$out/data"
heed train msga --data "$out/data" --out "$out/run" --trainer.max-epochs 30 --trainer.validate-every 5 \
    --training.augmentation.flip-probability 0.5
heed evaluate "$out/run" --data "$out/data"
heed predict "$out/run" "$out/data/imagesTs" --out "$out/predictions"
heed explain "$out/run" "$out/data/imagesTs" --out "$out/explanations"
heed train medusa --out "$out/chests" --trainer.max-epochs 8 --quiet
heed explain "$out/chests" "$out/chests/sample/test/chest_0000.png" --out "$out/seen/chests"
heed train acmil --out "$out/slides" --trainer.max-epochs 5 --quiet
heed explain "$out/slides" "$out/slides/sample/h5_files/slide_000.h5" --out "$out/seen/slides"
heed train ivgn --out "$out/reports" --trainer.max-epochs 10 --quiet
heed explain "$out/reports" "$out/reports/sample/images/test0000" --out "$out/seen/reports"
heed train more --out "$out/joint" --trainer.max-epochs 5 --quiet
heed retrieve "$out/joint" --text "Edema is present." --to xray --among "$out/joint/sample/images"
echo
echo "Pictures to look at:"
find "$out/run" "$out/explanations" "$out/seen" -name '*.png' -not -path '*/data/*' | sort | head -n 20

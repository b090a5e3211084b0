"""Detect objects in a video or on a camera: an annotated video, JSON by frame, or a window.

examples:
  fpn-ext video --run output/demo --input street.mp4 --output out.mp4
  fpn-ext video --config-file configs/demo/faster_rcnn_R_18_FPN.yaml --input street.mp4 \\
      --output out.mp4 --json out.jsonl MODEL.WEIGHTS output/demo_R_18/model_final.pth
  fpn-ext video --config-file ... --camera 0 --show MODEL.WEIGHTS ...
"""

import argparse
from pathlib import Path

from .options import add_config, add_detections, add_tuning, report_to_write, take_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, run=True)
    add_tuning(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=Path, metavar="VIDEO", help="video file to read")
    source.add_argument("--camera", type=int, metavar="N", help="camera to read, the first is 0")
    parser.add_argument(
        "--output", type=Path, metavar="VIDEO", help="video to write: .mp4, .avi, .mkv or .webm"
    )
    parser.add_argument(
        "--json",
        type=report_to_write,
        metavar="FILE",
        help="detections to write, a line of JSON per frame",
    )
    parser.add_argument("--show", action="store_true", help="show them in a window; q ends")
    add_detections(parser)
    parser.add_argument("--num-frames", type=int, metavar="N", help="end after N frames")
    parser.add_argument(
        "--fps", type=float, help="frames per second, in the place of what the source says"
    )


def run(args: argparse.Namespace) -> None:
    from ..inference.predictor import load_inference_config
    from ..inference.video import opencv, predict_video

    opencv()  # before looking for a model
    take_run(args)
    summary = predict_video(
        load_inference_config(args.config_file, args.opts, of_run=args.run is not None),
        args.input if args.camera is None else args.camera,
        args.output,
        args.json,
        min_score=args.min_score,
        label_levels=args.label_levels,
        show=args.show,
        num_frames=args.num_frames,
        fps=args.fps,
    )
    files = " and ".join(str(file) for file in (args.output, args.json) if file)
    print(f"{summary}{': ' if files else ''}{files}")

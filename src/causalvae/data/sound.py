"""The sound of a film, packet by packet: as it is where the new container takes it, else encoded again."""

from collections.abc import Iterable, Iterator
from fractions import Fraction

from av.audio.codeccontext import AudioCodecContext
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet

RATE = 48000  # samples a second, which every encoder has
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)  # ISO 14496-3
LAYOUTS = {1: "mono", 6: "5.1", 8: "7.1"}  # by the number of channels; others become stereo


class Sound:
    """Packets of a film's sound for another container, in order. notes: what was not taken over as it is.

    Errors of PyAV in reading the film leave as they are.
    """

    def __init__(
        self, inside: InputContainer, into: OutputContainer, *, zero: Fraction, encoder: str
    ) -> None:
        """Add the streams. zero: seconds that are the new time 0. encoder: where a copy is not taken."""
        self.notes: list[str] = []
        self._inside = inside
        self._zero = zero
        self._tracks: dict[int, _Copy | _Encoding] = {}
        for stream in inside.streams.audio:
            name = stream.codec_context.codec.canonical_name
            if name in into.supported_codecs:
                self._tracks[stream.index] = _Copy(into.add_stream_from_template(stream))
            else:
                self._tracks[stream.index] = _Encoding(stream, into, encoder=encoder)
                self.notes.append(f"its sound is encoded as {encoder}: {into.format.name} takes no {name}")
        self._packets = self._all()
        self._next = next(self._packets, None)

    def until(self, seconds: Fraction | None) -> Iterator[Packet]:
        """Packets that begin before this time and were not given yet; None: all that are left."""
        while self._next is not None:
            if seconds is not None and _begins(self._next) >= seconds:
                return
            yield self._next
            self._next = next(self._packets, None)

    def _all(self) -> Iterator[Packet]:
        if not self._tracks:
            return
        last: dict[int, int] = {}
        for packet in self._inside.demux(*self._inside.streams.audio):
            for made in self._tracks[packet.stream.index].take(packet, zero=self._zero):
                if made.dts is None or made.pts is None:
                    continue
                made.dts = max(made.dts, last.get(made.stream_index, made.dts - 1) + 1)  # none goes back
                made.pts = max(made.pts, made.dts)
                last[made.stream_index] = made.dts
                yield made


def _begins(packet: Packet) -> Fraction:
    assert packet.dts is not None
    assert packet.time_base is not None
    return packet.dts * packet.time_base


class _Copy:
    """One stream of sound, taken over as it is."""

    def __init__(self, stream: AudioStream) -> None:
        self._stream = stream

    def take(self, packet: Packet, *, zero: Fraction) -> Iterable[Packet]:
        """The packet for the new container; it is changed."""
        if packet.dts is None or packet.pts is None or packet.time_base is None:
            return []
        shift = round(zero / packet.time_base)
        packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
        packet.stream = self._stream
        return [packet]


class _Encoding:
    """One stream of sound, decoded and encoded again."""

    def __init__(self, original: AudioStream, into: OutputContainer, *, encoder: str) -> None:
        kept = encoder == "aac" and original.rate in AAC_RATES
        stream = into.add_stream(encoder, rate=original.rate if kept else RATE)
        assert isinstance(stream, AudioStream)
        stream.layout = LAYOUTS.get(original.layout.nb_channels, "stereo")
        context: AudioCodecContext = stream.codec_context
        context.open()
        self._stream = stream
        self._resampler = AudioResampler(
            format=context.format, layout=context.layout, rate=context.rate, frame_size=context.frame_size
        )

    def take(self, packet: Packet, *, zero: Fraction) -> Iterable[Packet]:
        """What the packet completes; an empty one ends the stream."""
        frames: list[AudioFrame | None] = []
        for frame in packet.decode():
            assert isinstance(frame, AudioFrame)
            if frame.pts is not None and frame.time_base is not None:
                frame.pts -= round(zero / frame.time_base)
            frames += self._resampler.resample(frame)
        if packet.size == 0:
            frames += [*self._resampler.resample(None), None]
        return [made for frame in frames for made in self._stream.encode(frame)]

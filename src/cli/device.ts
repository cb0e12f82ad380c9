// Which device a run uses, and the one line that says so.

import { fail } from '../errors.js';
import { native } from '../native.js';
import { gpuNames } from '../report/machine.js';
import type { Options } from './options.js';

export interface ChosenDevice {
  device: 'cpu' | 'cuda';
  /** One index per rank; [] for CPU workers. */
  devices: readonly number[];
  /** What a user should know of the choice; null when it was theirs. */
  line: string | null;
}

/**
 * The device of `--device` and `--gpus`; a launcher's task takes the GPU of its number, or the only one it is shown.
 * TP_DEVICE when CUDA is asked for and cannot be had.
 */
export function chooseDevice(options: Pick<Options, 'device' | 'gpus' | 'place'>): ChosenDevice {
  const { device, place } = options;
  const own = place.localRank !== null && options.gpus.devices === null && gpuNames().length > 1;
  const gpus = own ? { count: 1, devices: [place.localRank!] } : options.gpus;
  const obstacle =
    device === 'cpu' ? null : cudaObstacle(gpus.devices ? Math.max(...gpus.devices) + 1 : gpus.count);
  if (device === 'cuda' && obstacle) throw fail('TP_DEVICE', obstacle);
  if (device === 'cpu') return { device: 'cpu', devices: [], line: null };
  if (obstacle) {
    const workers = gpus.count === 1 ? '1 CPU worker' : `${gpus.count} CPU workers`;
    return { device: 'cpu', devices: [], line: `no usable GPU (${obstacle}): using ${workers}` };
  }
  return {
    device: 'cuda',
    devices: gpus.devices ?? Array.from({ length: gpus.count }, (_, i) => i),
    line: null,
  };
}

/** Why `count` GPUs cannot be used here, or null. */
export function cudaObstacle(count: number): string | null {
  const names = gpuNames();
  if (native().version().cuda === null) {
    return names.length
      ? 'this build of tp-run has no CUDA'
      : 'none found, and this build of tp-run has no CUDA';
  }
  if (names.length === 0) return 'the NVIDIA driver shows none';
  return names.length < count ? `${count} wanted, ${names.length} found` : null;
}

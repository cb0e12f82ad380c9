// What the addon says of this host's GPUs, in the words of the choice of a collective.

import type { GpuFacts } from '../comm/collective.js';
import { native } from '../native.js';

/** `env` is the environment of the ranks: who tells NCCL to leave P2P alone means all of it. */
export function gpuFacts(env: NodeJS.ProcessEnv = {}): GpuFacts {
  const { devices, nccl, ncclWhy } = native().cuda();
  return {
    peers: devices.map(({ peers }) => peers),
    peersOff: env.NCCL_P2P_DISABLE === '1' ? 'NCCL_P2P_DISABLE=1 switches P2P off' : null,
    ncclWhy: nccl === null ? ncclWhy : null,
  };
}

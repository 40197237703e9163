// Connections as they come and go.
import { useEffect, useRef, useState } from "preact/hooks";
import { type Flow, type Flows, follow, get } from "./api";
import { LongList, State } from "./parts";
import { bytes, clock, latency } from "./words";

const most = 2000;

interface Shown extends Flow {
  id: number;
}

export function FlowsView({ query }: { query: URLSearchParams }) {
  const [service, setService] = useState(query.get("service") ?? "");
  const [who, setWho] = useState("");
  const [failed, setFailed] = useState(false);
  const [open, setOpen] = useState(false);
  const [paused, setPaused] = useState(false);
  const [flows, setFlows] = useState<Shown[]>([]);
  const [note, setNote] = useState("");
  const ids = useRef(0);
  const held = useRef(paused);
  held.current = paused;
  const args = new URLSearchParams({ service, who, ...(failed ? { failed: "1" } : {}) }).toString();

  useEffect(() => {
    const stop = new AbortController();
    setFlows([]);
    const number = (all: Flow[]) => all.map((f) => ({ ...f, id: ids.current++ })).reverse();
    if (open) {
      get<{ flows: Flow[]; more: number }>("/v1/page/open?" + args, stop.signal).then(
        (a) => { setFlows(number(a.flows)); setNote(a.more ? `and ${a.more} more` : ""); },
        (e: Error) => stop.signal.aborted || setNote(e.message));
      return () => stop.abort();
    }
    let skipped = 0;
    const on = (_: string, m: Flows) => {
      skipped += m.skipped ?? 0;
      setNote([m.error, skipped ? `${skipped.toLocaleString("en")} more than can be shown` : "", m.lost ? `${m.lost.toLocaleString("en")} came too fast to be followed` : ""].filter(Boolean).join("; "));
      if (!held.current && m.flows?.length) setFlows((old) => number(m.flows!).concat(old).slice(0, most));
    };
    void follow("/v1/page/flows?" + args, stop.signal, on, (e) => setNote(e ? e.message : ""));
    return () => stop.abort();
  }, [args, open]);

  return (
    <section aria-label="Flows">
      <div class="tools">
        <span role="group" aria-label="What to show">
          <button type="button" aria-pressed={!open} onClick={() => setOpen(false)}>as they come</button>
          <button type="button" aria-pressed={open} onClick={() => setOpen(true)}>open now</button>
        </span>
        <input type="search" placeholder="Service" aria-label="Only of this service" value={service} onChange={(e) => setService(e.currentTarget.value.trim())} />
        <input type="search" placeholder="Process or its id" aria-label="Only of this process" value={who} onChange={(e) => setWho(e.currentTarget.value.trim())} />
        <label><input type="checkbox" checked={failed} onChange={(e) => setFailed(e.currentTarget.checked)} /> failures only</label>
        {!open && <button type="button" aria-pressed={paused} onClick={() => setPaused(!paused)}>{paused ? "go on" : "pause"}</button>}
        <span role="status">{note}</span>
      </div>
      {flows.length === 0 && <p class="none">{open ? "No connection is open." : "Nothing has happened since you look."}</p>}
      <LongList className="flows" label="Flows" height={32} all={flows}
        head={<><span role="columnheader">Time</span><span role="columnheader">Event</span><span role="columnheader">Process</span><span role="columnheader">Service</span><span role="columnheader">To</span>
          <span role="columnheader">Backend</span><span role="columnheader" class="n">RTT</span><span role="columnheader" class="n">Duration</span><span role="columnheader" class="n">Sent</span><span role="columnheader" class="n">Received</span></>}
        row={(f) => <FlowRow key={f.id} f={f} />} />
    </section>
  );
}

function FlowRow({ f }: { f: Flow }) {
  const level = /^(failed|refused)/.test(f.event) || f.outcome.startsWith("failed") ? 2 : f.event === "ejected" ? 1 : 0;
  return (
    <div class="row" role="row" title={f.outcome}>
      <span role="cell">{clock(f.time)}</span>
      <span role="cell"><State level={level}>{f.event}</State></span>
      <span role="cell">{f.user ? "user " + f.user : f.pid ? `${f.command}/${f.pid}` : "–"}</span>
      <span role="cell">{f.service ?? f.proxy ?? "–"}</span>
      <span role="cell">{f.vip ?? f.target ?? "–"}{f.protocol === "udp" ? "/udp" : ""}</span>
      <span role="cell">{f.backend ?? f.via?.join(", ") ?? "–"}{level > 0 ? ` · ${f.outcome}` : ""}</span>
      <span role="cell" class="n wide">{latency(f.rttSeconds)}</span>
      <span role="cell" class="n wide">{latency(f.durationSeconds)}</span>
      <span role="cell" class="n wide">{bytes(f.sent)}</span>
      <span role="cell" class="n wide">{bytes(f.received)}</span>
    </div>
  );
}

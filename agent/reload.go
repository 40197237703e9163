package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"

	"github.com/pentad/pentad/api"
	"github.com/pentad/pentad/config"
	"github.com/pentad/pentad/service"
	"github.com/pentad/pentad/source"
	"github.com/pentad/pentad/source/file"
)

// reload is somebody who wants the file to be read again, and may wait.
type reload struct {
	api.ReloadRequest
	done chan reloadOutcome // nil: nobody waits
}

type reloadOutcome struct {
	answer api.ReloadAnswer
	err    error
}

// pendingReload is a reload that the kernel does not have yet.
type pendingReload struct {
	reload
	answer api.ReloadAnswer
	number uint64
}

// onReload reads the file again and puts it in force. Who asks is answered when the
// kernel has it.
func (a *Agent) onReload(ctx context.Context, r reload) {
	tellManager(reloading())
	defer tellManager(daemon.SdNotifyReady)
	u := file.Read(a.opts.ConfigFile)
	err := u.Err
	if err == nil {
		a.keepSkipped(&u)
		if !r.Force {
			err = a.guarded(u)
		}
	}
	if err != nil {
		a.rejectFile(err)
		if r.done != nil {
			r.done <- reloadOutcome{err: fmt.Errorf("%w: %w", api.ErrRefused, firstErrors(err))}
		}
		return
	}
	before := a.known.services
	a.takeFile(ctx, u)
	if r.done == nil {
		return
	}
	answer := api.ReloadAnswer{Revision: a.known.services.Revision, Services: len(a.known.services.Services), Changed: before != a.known.services,
		Skipped: skipped(u.Config)}
	a.asked = append(a.asked, pendingReload{r, answer, a.known.number})
	a.answerReloads()
}

// reloading says since when (sd_notify(3), Type=notify-reload).
func reloading() string {
	var now unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) != nil {
		return daemon.SdNotifyReloading
	}
	return fmt.Sprintf("%s\nMONOTONIC_USEC=%d", daemon.SdNotifyReloading, now.Nano()/1000)
}

// answerReloads answers those of whom it is known what became of it.
func (a *Agent) answerReloads() {
	var left []pendingReload
	for _, p := range a.asked {
		done, err := a.outcomeOf(p.number)
		if !done {
			left = append(left, p)
			continue
		}
		p.done <- reloadOutcome{p.answer, err}
	}
	a.asked = left
}

// guardFrom is how many listeners the file must have for its guard to stand before them:
// of one or two, to change them all is nothing unusual.
const guardFrom = 4

// errHeld says that a file is valid and not put in force.
var errHeld = errors.New("the file is held back")

// guarded returns why a text of the file is not put in force without being forced to: it
// takes away more of what is served than the guard that is in force lets it.
func (a *Agent) guarded(u source.Update) error {
	now := a.inbox.file
	if now.Config == nil || now.Config.Guard == config.GuardOff {
		return nil
	}
	stays := make(map[service.Listener]bool)
	for _, s := range u.Services {
		for _, l := range s.Listeners {
			stays[l.At()] = true
		}
	}
	all, gone := 0, 0
	for _, s := range now.Services {
		for _, l := range s.Listeners {
			all++
			if !stays[l.At()] {
				gone++
			}
		}
	}
	if all < guardFrom || gone*100 <= all*now.Config.Guard {
		return nil
	}
	a.saveHeld(u.Text)
	return fmt.Errorf("%w: it takes away %d of %d listeners, and the guard in force is %d%%; `pentad reload --force` puts it in force",
		errHeld, gone, all, now.Config.Guard)
}

// mostErrors is how many errors of a file are logged and shown.
const mostErrors = 20

// firstErrors leaves out what nobody would read of an error with thousands of lines.
func firstErrors(err error) error {
	var all config.Errors
	if !errors.As(err, &all) || len(all) <= mostErrors {
		return err
	}
	return fmt.Errorf("%w\nand %d more errors", all[:mostErrors], len(all)-mostErrors)
}

// rejectFile notes why the newest text of the file is not in force.
func (a *Agent) rejectFile(err error) {
	var every config.Errors
	errors.As(err, &every)
	err = firstErrors(err)
	a.mu.Lock()
	a.invalid = err
	a.mu.Unlock()
	var all config.Errors
	if !errors.As(err, &all) {
		a.log.Error("configuration is not in force", "source", "file", "error", err)
		return
	}
	for _, e := range all {
		a.log.Error("configuration is not valid and not in force", "source", "file", "error", e)
	}
	if more := len(every) - len(all); more > 0 {
		a.log.Error("configuration is not valid and not in force", "source", "file", "more", more)
	}
}

// keepSkipped has the services of included files that are not valid stay what they were,
// unless another file has their names or listeners now.
func (a *Agent) keepSkipped(u *source.Update) {
	before := a.inbox.file.Config
	for name, errs := range u.Config.Skipped {
		for _, e := range firstOf(errs) {
			a.log.Error("an included file is not valid and not in force", "source", "file", "error", e)
		}
		if before == nil {
			continue
		}
		names, listeners := make(map[string]bool), make(map[service.Listener]bool)
		for _, s := range u.Services {
			names[s.Name] = true
			for _, l := range s.Listeners {
				listeners[l.At()] = true
			}
		}
		for _, s := range before.Files[name] {
			if names[s.Name] || slices.ContainsFunc(s.Listeners, func(l service.Listener) bool { return listeners[l.At()] }) {
				continue
			}
			u.Services = append(u.Services, s)
			u.Config.Files[name] = append(u.Config.Files[name], s)
		}
	}
}

func firstOf(errs config.Errors) config.Errors { return errs[:min(len(errs), mostErrors)] }

// skipped says which included files are not in force, a sentence each.
func skipped(c *config.Config) (problems []string) {
	if c == nil {
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(c.Skipped)) {
		problems = append(problems, fmt.Sprintf("%s is not valid and not in force: %v", name, firstErrors(c.Skipped[name])))
	}
	return problems
}
